"""The training step's GPU kernels, compiled without a GPU: registers, spills, shared memory; least time predicted."""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.command import BenchError
from bench.train import make_batches, mlp_operations
from model.config import ModelConfig, read_config
from model.dlrm import DLRM
from model.kernels.cost import BUS, H200, Cost, Shape

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
    """Every kernel as the wrappers in model/kernels launch it for such a model, by its name."""
    import triton

    from model.kernels import lookup_interaction, staging, unpack, update

    m, w = "*" + TYPES[matrices], "*" + TYPES[weights]
    vectors, chunk, warps = lookup_interaction.launch(tables, dim, 4 if matrices == "float32" else 2)
    tile = {"TABLES": tables, "DIM": dim, "SELF": False, "PRECISION": "tf32x3", "VECTORS": vectors, "CHUNK": chunk}
    columns, piece = max(16, triton.next_power_of_2(dim)), update.piece_length(dim)
    step = {"DIM": dim, "COLUMNS": columns, "PIECE": piece, "RULE": rule, "EPS": 1e-8, "BETA1": 0.9, "BETA2": 0.999,
            "STOCHASTIC": weights != "float32", "SKIPS": True}  # fmt: skip
    stepped = {"keys": "*i32", "partials": "*fp32", "weight": w, "sums": "*fp32", "squares": "*fp32", "lr": "*fp32",
               "scale": "*fp32", "step": "*i64", "skip": "*fp32", "lookups": "i32"}  # fmt: skip
    return {
        "forward": Variant(
            lookup_interaction._forward,
            {"bottom": m, "sparse": "*i32", "weight": w, "begins": "*i64", "limits": "*i64", "out": m,
             "rows_out": "*i32"},
            {**tile, "HASH": True, "KEEP_ROWS": True}, warps,
        ),
        "backward": Variant(
            lookup_interaction._backward,
            {"grad": m, "bottom": m, "rows_in": "*i32", "weight": w, "grad_bottom": m, "grad_tables": m}, tile, warps,
        ),
        "step_pieces": Variant(
            update._step_pieces, {**stepped, "order": "*i64", "grads": m}, step, update.piece_warps(dim)
        ),
        "step_spanning": Variant(
            update._step_spanning, stepped, {**step, "GROUP": update.PARTIALS // columns}, update.SPANNING_WARPS
        ),
        "fetch": Variant(
            staging._fetch, {"weight": w, "keys": "*i32", "staged": w, "lookups": "i32"},
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
        "unpack": unpack.unpack_cost(shape.batch), "forward": lookup_interaction.forward_cost(shape),
        "backward": lookup_interaction.backward_cost(shape), "step": update.update_cost(shape, rule),
    }  # fmt: skip


def draw_shape(config: ModelConfig, batch_size: int, weight_bytes: int, matrix_bytes: int) -> Shape:
    """Sizes of a batch with ids as popular as the synthetic days' values."""
    sizes = config.categorical_feature_sizes
    ids = make_batches(sizes, batch_size, torch.device("cpu"))[0].sparse
    distinct = sum(len(column.unique()) for column in ids.T)
    return Shape(batch_size, len(sizes), config.embedding_dim, distinct, weight_bytes, matrix_bytes)


def measure(args: argparse.Namespace) -> dict:
    """Compile the kernels; what they use, and what their bytes and operations predict on an H200.

    samples_per_second_by_the_bus: of tables in host memory.
    """
    if find_spec("triton") is None:
        raise BenchError("triton is missing: pip install -r requirements-dev.txt")
    from model.kernels import staging

    config, _ = read_config(args.model_config)
    sizes = [4 if name == "float32" else 2 for name in (args.embedding_dtype, args.matrices)]
    shape = draw_shape(config, args.batch_size, *sizes)
    found = {}
    chosen = variants(shape.tables, shape.dim, args.matrices, args.embedding_dtype, args.embedding_optimizer)
    for name, variant in chosen.items():
        found[name] = compiled(variant, args.capability)
        print(f"{name:14} {found[name]}", file=sys.stderr)
    predicted, total = {}, 0.0
    for name, cost in costs(shape, args.embedding_optimizer).items():
        seconds = cost.seconds(H200, "bfloat16" if name == "step" else args.matrices)  # float32 sums: three passes
        total += seconds
        predicted[name] = {
            "bytes": round(cost.bytes), "operations": round(cost.operations), "predicted_us": round(seconds * 1e6, 1)
        }
        print(f"{name:14} {predicted[name]}", file=sys.stderr)
    with torch.device("meta"):
        mlps = mlp_operations(DLRM(config.with_tables([1] * shape.tables)))
    mlp_seconds = mlps * shape.batch / H200.operations[args.matrices]
    bound = {
        "kernels_us": round(total * 1e6, 1), "mlps_us": round(mlp_seconds * 1e6, 1),
        "samples_per_second": round(shape.batch / (total + mlp_seconds)),
        "samples_per_second_by_the_bus": round(shape.batch * BUS / max(staging.bus_bytes(shape))),
    }  # fmt: skip
    print(f"predicted for an H200, not measured, no launch or tail in it: {bound}", file=sys.stderr)
    return {"capability": args.capability, "model_config": args.model_config, "batch_size": shape.batch,
            "distinct_rows": shape.distinct, "kernels": found, "predictions_for_h200": predicted,
            "predicted_bound": bound}  # fmt: skip
