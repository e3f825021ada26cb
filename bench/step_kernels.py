"""The training step's GPU kernels: registers, spills, shared memory, least time predicted; on a GPU the time taken."""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import torch

from bench import timing
from bench.batches import FRESH_BATCHES, fit_tables, make_ids
from bench.command import BenchError
from bench.train_limits import mlp_operations
from model.config import ModelConfig, read_config
from model.kernels.cost import BUS, H200, Cost, Shape
from model.layers.embedding import JointEmbedding, Storage
from model.layers.optimizers import Optimizer

CAPABILITIES = ("8.0", "9.0", "10.0")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)")
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--capability", default="9.0", choices=CAPABILITIES, help="of the GPU (default: 9.0, Hopper)")
    parser.add_argument("--model_config", default="mlperf_40m.limit", metavar="NAME|FILE")
    parser.add_argument("--batch_size", type=int, default=65536, metavar="B", help="default: 65536")
    parser.add_argument("--embedding_dtype", default="float32", choices=TYPES)
    parser.add_argument("--embedding_optimizer", default="sgd", choices=("sgd", "rowwise_adagrad", "adagrad", "adam"))
    parser.add_argument("--matrices", default="bfloat16", choices=TYPES, help="their type (default: bfloat16)")


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments ("*fp32": a pointer), its constants and warps: what one launch is."""

    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int


def variants(tables: int, dim: int, matrices: str, weights: str, rule: str) -> dict[str, Variant]:
    """Every kernel as the wrappers in model/kernels launch it for such a model, by its name; with float16, as a step
    that may be skipped."""
    import triton

    from model.kernels import lookup_interaction, staging, unpack, update

    m, w = "*" + TYPES[matrices], "*" + TYPES[weights]
    size, skips = 4 if matrices == "float32" else 2, matrices == "float16"
    vectors, chunk, warps = lookup_interaction.launch(tables, dim, size)
    tile = {"TABLES": tables, "DIM": dim, "SELF": False, "PRECISION": "tf32x3", "VECTORS": vectors, "CHUNK": chunk}
    columns, piece = max(16, triton.next_power_of_2(dim)), update.piece_length(dim)
    step = {"DIM": dim, "COLUMNS": columns, "PIECE": piece, "RULE": rule, "EPS": 1e-8, "BETA1": 0.9, "BETA2": 0.999,
            "STOCHASTIC": weights != "float32", "SKIPS": skips}  # fmt: skip
    stepped = {"keys": "*i32", "partials": "*fp32", "weight": w, "sums": "*fp32", "squares": "*fp32", "lr": "*fp32",
               "scale": "*fp32", "step": "*i64", "skip": "*fp32", "lookups": "i32"}  # fmt: skip
    return {
        "find_rows": Variant(
            lookup_interaction._find_rows,
            {"sparse": "*i32", "begins": "*i64", "limits": "*i64", "rows": "*i32", "lookups": "i32"},
            {"TABLES": tables, "HASH": True, "BLOCK": lookup_interaction.IDS}, 4,
        ),
        "forward": Variant(
            lookup_interaction._forward, {"bottom": m, "rows_in": "*i32", "weight": w, "out": m}, tile, warps
        ),
        "backward": Variant(
            lookup_interaction._backward,
            {"grad": m, "bottom": m, "rows_in": "*i32", "weight": w, "grad_bottom": m, "grad_tables": m,
             "flag": "*fp32" if skips else m}, tile | {"CHECKS": skips}, warps,
        ),
        "step_pieces": Variant(
            update._step_pieces, {**stepped, "order": "*i64", "grads": m}, step, update.piece_warps(dim, rule, size)
        ),
        "step_spanning": Variant(
            update._step_spanning, stepped, {**step, "GROUP": update.PARTIALS // columns}, update.SPANNING_WARPS
        ),
        "fetch": Variant(
            staging._fetch, {"weight": w, "keys": "*i32", "slots": "*i32", "staged": w, "lookups": "i32"},
            {"DIM": dim, "COLUMNS": columns, "BLOCK": staging.ROWS}, staging.WARPS,
        ),
        "unpack": Variant(
            unpack._unpack, {"records": "*i32", "dense": "*fp32", "sparse": "*i32", "label": "*fp32", "rows": "i32"},
            {"COLUMNS": unpack.RECORD, "NUMBERS": unpack.DENSE, "IDS": unpack.SPARSE, "BLOCK": unpack.ROWS}, 4,
        ),
    }  # fmt: skip


def compiled(variant: Variant, capability: str) -> dict[str, int]:
    """Registers a thread, bytes of stack (spilled registers lie there) and of shared memory in the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    source = ASTSource(variant.kernel, signature, constants, aligned)
    built = triton.compile(source, target=target, options={"num_warps": variant.warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, USAGE.search(done.stdout).groups())
    return {"registers": registers, "stack_bytes": stack + local, "shared_bytes": built.metadata.shared,
            "warps": variant.warps}  # fmt: skip


def costs(shape: Shape, rule: str) -> dict[str, Cost]:
    """Least bytes and operations of the kernels of a step; "step": sort and both kernels of the update together."""
    from model.kernels import lookup_interaction, unpack, update

    return {
        "unpack": unpack.unpack_cost(shape.batch), "find_rows": lookup_interaction.rows_cost(shape),
        "forward": lookup_interaction.forward_cost(shape),
        "backward": lookup_interaction.backward_cost(shape), "step": update.update_cost(shape, rule),
    }  # fmt: skip


def draw_shape(config: ModelConfig, batch_size: int, weight_bytes: int, matrix_bytes: int) -> Shape:
    """Sizes of a batch with ids as popular as the synthetic days' values."""
    sizes = config.categorical_feature_sizes
    ids = make_ids(sizes, batch_size, torch.device("cpu"))[0]
    distinct = sum(len(column.unique()) for column in ids.T)
    return Shape(batch_size, len(sizes), config.embedding_dim, distinct, weight_bytes, matrix_bytes)


def calls(
    config: ModelConfig, batch_size: int, matrices: str, weights: str, rule: str, device: torch.device
) -> dict[str, Callable]:
    """What launches the kernels of costs() on a batch of its own each time, by the same names."""
    from model.kernels import lookup_interaction, unpack, update

    sizes, dim, optimizer = config.categorical_feature_sizes, config.embedding_dim, Optimizer(rule)
    with device:
        tables = JointEmbedding(sizes, dim, config.hash_indices, optimizer, Storage(getattr(torch, weights)))
        scalars = torch.tensor(0.01), torch.tensor(1.0), torch.tensor(1)
        records = torch.randint(100, (batch_size, 40), dtype=torch.int32)
        bottom = torch.randn(batch_size, dim).to(getattr(torch, matrices))
    weight, ids = tables.weight.detach(), make_ids(sizes, batch_size, device)

    def find_rows(sparse):
        return lookup_interaction.find_rows(sparse, tables.begins, tables.limits, config.hash_indices, len(weight))

    rows = [find_rows(sparse) for sparse in ids]
    grad = lookup_interaction.forward(bottom, rows[0], weight, False)
    grads = lookup_interaction.backward(grad, bottom, rows[0], weight, False)[1]
    ids, rows = cycle(ids), cycle(rows)
    settings = rule, optimizer.epsilon, optimizer.betas, *scalars
    return {
        "unpack": lambda: unpack.unpack(records),
        "find_rows": lambda: find_rows(next(ids)),
        "forward": lambda: lookup_interaction.forward(bottom, next(rows), weight, False),
        "backward": lambda: lookup_interaction.backward(grad, bottom, next(rows), weight, False),
        "step": lambda: update.update(weight, tables.state(), next(rows).flatten(), grads, *settings),
    }


def seconds_taken(call: Callable) -> float:
    """Of a call on the current GPU: median of 20 runs of a CUDA graph of FRESH_BATCHES calls. Launched one by one, the
    smaller kernels would take as long as Python needs to launch them."""
    device = torch.device("cuda")
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(FRESH_BATCHES):
            call()
    times = [timing.seconds(graph.replay, device) for _ in range(25)]
    return statistics.median(times[5:]) / FRESH_BATCHES


def measure(args: argparse.Namespace) -> dict:
    """Compile the kernels; what they use, and what their bytes and operations predict on an H200.

    samples_per_second_by_the_bus: of tables in host memory.
    """
    if find_spec("triton") is None:
        raise BenchError("triton is missing: pip install -r requirements-dev.txt")
    from model.kernels import staging

    config, _ = read_config(args.model_config)
    sizes = [4 if name == "float32" else 2 for name in (args.embedding_dtype, args.matrices)]
    gpu = torch.cuda.is_available()
    if gpu:  # room is left for the rule's memory and for gradients
        parts = 1 + {"sgd": 0, "rowwise_adagrad": 0.1, "adagrad": 1, "adam": 2}[args.embedding_optimizer] * 4 / sizes[0]
        config = fit_tables(config, 0.7 * torch.cuda.mem_get_info()[0] / parts * 4 / sizes[0])
    shape = draw_shape(config, args.batch_size, *sizes)
    types, found = (args.matrices, args.embedding_dtype, args.embedding_optimizer), {}
    chosen = variants(shape.tables, shape.dim, *types)
    for name, variant in chosen.items():
        found[name] = compiled(variant, args.capability)
        print(f"{name:14} {found[name]}", file=sys.stderr)
    launches = calls(config, args.batch_size, *types, torch.device("cuda")) if gpu else {}
    predicted, total = {}, 0.0
    for name, cost in costs(shape, args.embedding_optimizer).items():
        seconds = cost.seconds(H200, "bfloat16" if name == "step" else args.matrices)  # float32 sums: three passes
        total += seconds
        predicted[name] = {
            "bytes": round(cost.bytes),
            "operations": round(cost.operations),
            "predicted_us": round(seconds * 1e6, 1),
        }
        if launches:
            taken = seconds_taken(launches[name])
            predicted[name] |= {"measured_us": round(taken * 1e6, 1), "bytes_per_second": round(cost.bytes / taken)}
        print(f"{name:14} {predicted[name]}", file=sys.stderr)
    mlp_seconds = mlp_operations(config) * shape.batch / H200.operations[args.matrices]
    bound = {
        "kernels_us": round(total * 1e6, 1), "mlps_us": round(mlp_seconds * 1e6, 1),
        "samples_per_second": round(shape.batch / (total + mlp_seconds)),
        "samples_per_second_by_the_bus": round(shape.batch * BUS / max(staging.bus_bytes(shape))),
    }  # fmt: skip
    print(f"predicted for an H200, not measured, no launch or tail in it: {bound}", file=sys.stderr)
    return {"capability": args.capability, "model_config": args.model_config, "batch_size": shape.batch,
            "embedding_rows": sum(config.categorical_feature_sizes), "distinct_rows": shape.distinct,
            "machine_code": found, "kernels": predicted,
            "predicted_bound": bound}  # fmt: skip
