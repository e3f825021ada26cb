"""Cases of test_stand_in.py, each run in a process of its own, on a GPU that is not there (stand_in.py).

TRITON_INTERPRET=1 python -m tests.model.stand_in_cases steps
"""
# ruff: noqa: E402 - the stand-in comes before all else

import contextlib
import io
import json
import sys
import tempfile
from itertools import chain
from pathlib import Path

from tests.model import stand_in_cuda

stand_in_cuda.install()

import numpy as np
import torch
import torch.distributed as dist

import train
from bench import step_kernels, train as bench_train, train_limits
from gpu_etl.load.dataset import RecordFile
from gpu_etl.load.plain import CpuLoader
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.pipeline import Settings, encode_days
from model.distributed.process_group import Groups, Ranks
from model.distributed.trainer import RankLoader, RankTrainer, make_model
from model.dlrm import DLRM
from model.layers.embedding import Storage
from model.layers.optimizers import NAMES, Optimizer
from model.planner.plan import Piece, Plan
from model.training.loop import LoopOptions, fit
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import SIZES, Batch, ListLoader, random_batches, small_config
from tests.model.stand_in import CUDA, MACHINE, OnDevice
from tests.reference import write_rows

SCHEDULE = Schedule(0.2, warmup_steps=4, decay_start_step=8, decay_steps=20)
PRECISIONS = (Precision(), Precision(torch.bfloat16), Precision(torch.float16, 2.0**40, True))
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
         torch.int64: "*i64"}  # fmt: skip
WARM_UP = 10  # steps until all graphs are recorded
FLOAT, ON_DEVICE = Precision(), Storage()


def make_trainer(device=CUDA, precision=FLOAT, mlps="sgd", tables="sgd", storage=ON_DEVICE, **changes) -> Trainer:
    """A small model's."""
    torch.manual_seed(0)
    with device:
        model = DLRM(small_config(**changes), True, Optimizer(tables), storage)
    return Trainer(model, SCHEDULE, precision, Optimizer(mlps), fused=False)


def on_device(batches: list[Batch]) -> list[Batch]:
    """The batches there."""
    return [Batch(*(tensor.to(CUDA) for tensor in batch)) for batch in batches]


def short_first(count: int, rows: int) -> list[Batch]:
    """A short batch, as of a run that goes on at the end of an epoch, then full ones and a short one now and then."""
    found = on_device(random_batches(count, rows))
    return [Batch(*(tensor[: rows // 3].clone() for tensor in b)) if i % 7 == 0 else b for i, b in enumerate(found)]


def trained(trainer: Trainer, batches: list[Batch]) -> list[float]:
    """Losses; after the first steps, nothing may wait for the device."""
    losses = []
    for number, batch in enumerate(batches):
        if number < WARM_UP:
            losses.append(trainer.step(batch))
            continue
        with MACHINE.step():
            losses.append(trainer.step(batch))
    return [loss.item() for loss in losses]


def weights(trainer: Trainer) -> list[torch.Tensor]:
    """The numbers of all weights."""
    return [(p.elem if isinstance(p, OnDevice) else p).detach().clone() for p in trainer.model.parameters()]


def as_compiled(trainer: Trainer, rule: str) -> None:
    """Pointers of all launches are of the types that tests compile the kernels for."""
    config, matrices = trainer.model.config, str(trainer.matrices)[6:]
    stored = str(trainer.model.embedding.weight.dtype)[6:]
    known = step_kernels.variants(len(config.categorical_feature_sizes), config.embedding_dim, matrices, stored, rule)
    assert MACHINE.launches
    for name, pointers in MACHINE.launches:
        expected = {name: kind for name, kind in known[name.removeprefix("_")].types.items() if kind[0] == "*"}
        launched = {key: TYPES[dtype] for key, dtype in pointers.items()}
        assert launched == expected, (name, launched, expected)


def steps() -> None:
    """Steps launched one by one and as graphs: the same bits, no fault, the types that are compiled; beside the CPU."""
    cases = [(precision, "sgd", "sgd", Storage(), {}) for precision in PRECISIONS]
    cases += [(PRECISIONS[2], "adam", "rowwise_adagrad", Storage(), {"hash_indices": True})]
    cases += [(PRECISIONS[1], "sgd", "adam", Storage(torch.bfloat16, placement="host"), {"self_interaction": True})]
    cases += [(Precision(), "sgd", "adagrad", Storage(torch.float16), {"interaction_op": "cat"})]
    dcn = {"interaction_op": "dcnv2", "dcn_num_layers": 1, "dcn_low_rank_dim": 3}
    cases += [(PRECISIONS[2], "adam", "rowwise_adagrad", Storage(placement="host"), dcn)]
    batches = short_first(20, 9)
    for precision, mlps, tables, storage, changes in cases:
        ends = []
        for graphs in (False, True):
            trainer = make_trainer(CUDA, precision, mlps, tables, storage, **changes)
            if graphs:
                trainer.use_cuda_graphs()
            before = weights(trainer)
            MACHINE.launches.clear()
            ends.append((trained(trainer, batches), weights(trainer)))
            if not changes.get("interaction_op") and "self_interaction" not in changes:
                as_compiled(trainer, tables)
            assert MACHINE.faults == [], MACHINE.faults
        assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1])), (precision, mlps, tables)
        if storage == Storage() and not precision.autocast:
            beside_the_cpu(before, batches, ends[0], changes)


def beside_the_cpu(before: list[torch.Tensor], batches: list[Batch], end: tuple, changes: dict) -> None:
    """From the same weights, by the CPU's own step, to the same losses and weights."""
    cpu = make_trainer(torch.device("cpu"), **changes)
    for parameter, numbers in zip(cpu.model.parameters(), before, strict=True):
        parameter.data.copy_(numbers)
    losses = [cpu.step(Batch(*(tensor.elem for tensor in batch))).item() for batch in batches]
    torch.testing.assert_close(end[0], losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end[1], weights(cpu), rtol=1e-3, atol=1e-4)


def optimizers() -> None:
    """Every optimiser of the MLPs in every precision reads its learning rate on the device, waits for nothing, and
    skips a step that overflows; where torch has no fused Adagrad for a GPU, too."""
    from torch.optim import adagrad

    check = adagrad._device_dtype_check_for_fused
    changes = {"embedding_dim": 12, "bottom_mlp_sizes": (12,)}  # no kernels, which steps() has: they take long here
    for name, lacking in [(name, False) for name in NAMES] + [("adagrad", True)]:
        if lacking:  # as torch 2.11 says it
            adagrad._device_dtype_check_for_fused = lambda p, **_: check(p, cuda_unsupported=True)
        ends = []
        for precision in PRECISIONS[::2]:
            trainer = make_trainer(CUDA, precision, name, **changes)
            assert bool(trainer.remarks()) == (name.endswith("adagrad") and (lacking or TORCH_2_11))
            trained(trainer, on_device(random_batches(14, 9)))
            assert MACHINE.faults == [], (name, MACHINE.faults)
            assert not trainer.loss_scale or trainer.loss_scale.skipped.elem > 3
            ends.append(weights(trainer))
        adagrad._device_dtype_check_for_fused = check
        cpu = make_trainer(torch.device("cpu"), FLOAT, name, **changes)
        fresh = make_trainer(CUDA, FLOAT, name, **changes)
        for parameter, numbers in zip(cpu.model.parameters(), weights(fresh), strict=True):
            parameter.data.copy_(numbers)
        for batch in random_batches(14, 9):
            cpu.step(batch)
        torch.testing.assert_close(ends[0], weights(cpu), rtol=1e-3, atol=1e-4)


TORCH_2_11 = torch.__version__.startswith("2.11")


def placements() -> None:
    """Tables in host memory and on the device begin with the same numbers, and end with them."""
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for placement in ("device", "host"):
            trainer = make_trainer(storage=Storage(dtype, placement=placement))
            ends.append([weights(trainer), trained(trainer, on_device(random_batches(4, 9))), weights(trainer)])
        (first, *_), (second, *_) = ends
        assert all(map(torch.equal, first, second)), dtype
        assert ends[0][1] == ends[1][1] and all(map(torch.equal, ends[0][2], ends[1][2])), dtype


def write_records(folder: str, rows: int) -> Path:
    """Records of the small model's tables, widened to 26."""
    generator = np.random.default_rng(0)
    records = generator.integers(0, 1000, (rows, 40), np.int32)
    records[:, 0] &= 1
    records[:, 14:] %= np.resize(SIZES, 26)
    path = Path(folder) / "records.bin"
    records.tofile(path)
    return path


def loaders() -> None:
    """Each loader's batches on the device are those on the CPU; the loop trains and tests on them without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        source = RecordFile(write_records(folder, 180))
        # A dim that the kernels do not know: in the interpreter they take long, and steps() has them.
        changes = {"categorical_feature_sizes": tuple(map(int, np.resize(SIZES, 26))), "embedding_dim": 12}
        for kind, buffer in ((CpuLoader, 0), (CpuLoader, 90), (ResidentLoader, 0), (ResidentLoader, 90)):
            mine, plain = (kind(source, 32, device, True, 3, buffer) for device in (CUDA, torch.device("cpu")))
            for epoch in (0, 1):
                for ours, expected in zip(mine.batches(epoch), plain.batches(epoch), strict=True):
                    assert all(isinstance(tensor, OnDevice) for tensor in ours)
                    assert all(torch.equal(a.elem, b) for a, b in zip(ours, expected, strict=True)), kind
            trainer = make_trainer(bottom_mlp_sizes=(12,), **changes)
            trainer.use_cuda_graphs()
            test = lambda t=trainer, m=mine: t.evaluate(m.batches(), len(m), "test")  # noqa: E731
            fit(trainer, mine, test, LoopOptions(epochs=2, test_freq=3))
            steady = chain(mine.batches(1), mine.batches(2))
            for batch in steady:
                with MACHINE.step():
                    trainer.step(batch)
            del batch
            assert MACHINE.faults == [], (kind, buffer, MACHINE.faults)


def ranks() -> Ranks:
    """One rank, by gloo, on the device."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(0, 1, CUDA, Groups(*[dist.group.WORLD] * 3))


def sharding() -> None:
    """The step of a rank with tables cut every way, so that nothing of the exchange is left out: without a fault, and
    beside a single process; and of a rank that has all tables whole."""
    cut = Plan(1, SIZES, 16, (0,), (Piece(0, 1, 0, 6, 0, 16), Piece(0, 1, 6, 11, 0, 16), Piece(0, 2, 0, 200, 0, 8),
                                    Piece(0, 2, 0, 200, 8, 16), Piece(0, 3, 0, 1, 0, 16)))  # fmt: skip
    whole = Plan(1, SIZES, 16, (), tuple(Piece(0, t, 0, size, 0, 16) for t, size in enumerate(SIZES)))
    changes = {"embedding_dim": 16, "bottom_mlp_sizes": (16,)}
    batches = on_device(random_batches(14, 9))
    for plan in (cut, whole):
        for precision, tables in ((Precision(), "sgd"), (PRECISIONS[2], "adam"), (Precision(), "adagrad")):
            torch.manual_seed(0)
            model = make_model(small_config(**changes), plan, ranks(), Optimizer(tables))
            trainer = RankTrainer(ranks(), model, SCHEDULE, precision, Optimizer("sgd"))
            loader = RankLoader(ListLoader(batches), model.embedding, 9, 9 * len(batches))
            losses = trained(trainer, loader.batches())
            expected = trained(make_trainer(CUDA, precision, "sgd", tables, **changes), batches)
            torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
            assert MACHINE.faults == [], (plan.kinds(), tables, MACHINE.faults)


def benchmarks() -> None:
    """Those of training: steps, as graphs too; kernels; limits. Without the peer, whose gradients are sparse tensors,
    which the stand-in does not know."""
    sizes = tuple(map(int, np.resize(SIZES, 26)))
    small = small_config(categorical_feature_sizes=sizes, embedding_dim=12, bottom_mlp_sizes=(12,))
    bench_train.LEAST["cuda"], bench_train.TURN["cuda"], bench_train.peers = 4, 4, lambda mine: {}
    for name, precision in bench_train.PRECISIONS.items():
        found = bench_train.measure_one(small, 9, precision, CUDA, 0.0)
        assert MACHINE.faults == [], MACHINE.faults
        assert found.keys() == {"ours", "ours, CUDA graph"}, name
        assert all(figures["samples_per_second"] > 0 for figures in found.values())
    config = small_config(categorical_feature_sizes=(30,) * 26, bottom_mlp_sizes=(64,), embedding_dim=64)
    for call in step_kernels.calls(config, 3, "bfloat16", "float32", "sgd", CUDA).values():
        assert step_kernels.seconds_taken(call) > 0
    train_limits.SIDE["cuda"], train_limits.COPY_BYTES["cuda"] = 64, 1 << 10
    assert train_limits.matrix_operations(torch.bfloat16, CUDA) > 0 and train_limits.copy_bytes(CUDA) > 0


def train_py() -> None:
    """The whole command with graphs: encoded days in, training in float16 with tests and checkpoints, and on from one
    of these in the midst of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        days, out = [Path(folder) / f"day_{day}" for day in range(3)], Path(folder) / "out"
        for day, path in enumerate(days):
            path.write_bytes(write_rows(seed=day, rows=(150, 60, 60)[day]))
        encode_days(days, Path(folder) / "set", Settings())
        words = ["--dataset", f"{folder}/set", "--output_dir", str(out), "@criteo_kaggle", "--cuda_graphs",
                 "--device", "cuda", "--batch_size", "32", "--test_batch_size", "64", "--test_freq", "6", "--lr",
                 "0.001"]  # fmt: skip
        runs = (["--epochs", "3", "--save_freq", "5"], 21), (["--epochs", "4", "--ckpt", str(out)], 28)
        for more, steps in runs:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                assert train.main([*words, *more]) == 0
            result = json.loads(said.getvalue().splitlines()[-1])
            assert result["steps"] == steps and result["device"] == "cuda" and result["loss_scale"]["skipped"] == 0
            assert np.isfinite(result["test"]["log_loss"]) and len(result["validation"]) > 0
            assert MACHINE.faults == [], MACHINE.faults
        assert (out / "step_20").is_dir()


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
    print("agrees")
