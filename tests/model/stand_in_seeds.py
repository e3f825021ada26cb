"""Faults put back where they once were, or might be: the stand-in finds them (test_stand_in.py; a process for each).

TRITON_INTERPRET=1 python -m tests.model.stand_in_seeds [NAME ...]
"""

import os
import sys
import tempfile
import traceback

import pytest
import torch

from gpu_etl.load import loader
from gpu_etl.load.dataset import RecordFile
from gpu_etl.load.plain import CpuLoader
from model.config import ConfigError
from model.kernels import staging
from model.layers import embedding, optimizers
from model.layers.embedding import Storage
from model.training import cuda_graph as graph, trainer as training
from tests.model import stand_in_cases as cases  # first: it puts the stand-in in place
from tests.model.helpers import random_batches
from tests.model.stand_in import CUDA, MACHINE, OnDevice
from tests.model.stand_in_cuda import CUDAGraph, Stream


def kinds_in_steps(trainer, batches) -> set[str]:
    """Kinds of faults in steps after the first ones."""
    cases.trained(trainer, batches)
    return MACHINE.kinds()


def a_number_of_the_device_in_the_step(ask) -> None:
    """.item() and the like, where steps are launched one by one and where they are recorded."""
    batches = cases.on_device(random_batches(12, 9))
    for graphs in (False, True):
        trainer = cases.make_trainer()
        assert kinds_in_steps(trainer, batches) == set()
        trainer.exchange = lambda gradients: ask(gradients[0].sum())
        if not graphs:
            assert kinds_in_steps(trainer, batches) == {"waits"}
            continue
        trainer.use_cuda_graphs()
        with pytest.raises(ConfigError, match="--cuda_graphs: this step cannot be recorded"):
            cases.trained(trainer, batches)


def asking(name: str, ask):
    """The seed of one way to ask; a process each, as what a failed recording leaves would be taken for its fault."""

    def seed() -> None:
        a_number_of_the_device_in_the_step(ask)

    seed.__name__ = f"a_number_of_the_device_in_the_step_{name}"
    return seed


ASKING = [
    asking("item", lambda t: t.item()), asking("bool", bool), asking("cpu", lambda t: t.cpu()),
    asking("tolist", lambda t: t.tolist()), asking("nonzero", lambda t: t.nonzero()),
    asking("synchronize", lambda _: torch.cuda.synchronize()),
]  # fmt: skip


def a_scan_that_one_block_does() -> None:
    """As the staging of host tables had one (T5)."""
    batches, old = cases.on_device(random_batches(12, 9)), staging.stage
    assert kinds_in_steps(cases.make_trainer(storage=Storage(placement="host")), batches) == set()
    staging.stage = lambda weight, keys, places: (places.cummax(0), old(weight, keys, places))[1]
    assert kinds_in_steps(cases.make_trainer(storage=Storage(placement="host")), batches) == {"one block"}


def copies_from_pageable_memory() -> None:
    """Batches on the host, and a loader's slots."""
    for pinned, expected in ((True, set()), (False, {"pageable"})):
        trainer = cases.make_trainer()
        trainer.use_cuda_graphs()
        batches = random_batches(12, 9)
        if pinned:
            batches = [type(batch)(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
        assert kinds_in_steps(trainer, batches) == expected
        if not pinned:
            real = loader.Slot.__init__
            loader.Slot.__init__ = lambda self, _, real=real: real(self, False)
        assert loader_faults() == expected


def loader_faults() -> set[str]:
    """Of a loader and of what works on its batches."""
    with tempfile.TemporaryDirectory() as folder:
        source, found = RecordFile(cases.write_records(folder, 400)), []
        loader_ = CpuLoader(source, 32, CUDA)
        loader_.check = lambda: None  # which waits for the device once an epoch, behind its last batch
        with MACHINE.step():
            for batch in loader_.batches():
                found.append(batch.dense.sum() + batch.label.sum())
                del batch
    return MACHINE.kinds()


def streams_without_an_order() -> None:
    """The trainer does not wait for the loader's stream."""
    assert loader_faults() == set()
    Stream.wait_event = lambda self, event: None
    assert loader_faults() == {"race"}


def memory_given_away_too_early() -> None:
    """The loader's stream has made a batch, another works on it, and nobody tells the allocator."""
    assert loader_faults() == set()
    OnDevice.record_stream = lambda self, stream: None
    assert loader_faults() == {"freed"}


def tensors_of_two_devices() -> None:
    """A kernel's argument, and torch's."""
    (batch,) = cases.on_device(random_batches(1, 9))
    trainer = cases.make_trainer()
    trainer.model.embedding.begins = trainer.model.embedding.begins.cpu()
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        trainer.step(batch)
    trainer = cases.make_trainer(embedding_dim=12, bottom_mlp_sizes=(12,))
    trainer.model.interaction.pairs = trainer.model.interaction.pairs.cpu()
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        trainer.step(batch)


def types_that_no_kernel_was_compiled_for() -> None:
    """The number of the step as a float, as graphs once had it."""
    for dtype in (torch.int64, torch.float32):
        trainer = cases.make_trainer()
        trainer.use_cuda_graphs()
        trainer.model.embedding.step = torch.zeros((), dtype=dtype, device=CUDA)
        MACHINE.launches.clear()
        cases.trained(trainer, cases.on_device(random_batches(2, 9)))
        if dtype == torch.int64:
            cases.as_compiled(trainer, "sgd")
        else:
            with pytest.raises(AssertionError, match="_step_pieces"):
                cases.as_compiled(trainer, "sgd")


def fused_adagrad_taken_for_granted() -> None:
    """As torch 2.11 answers it, at the first step (T3)."""
    from torch.optim import adagrad

    check = adagrad._device_dtype_check_for_fused
    adagrad._device_dtype_check_for_fused = lambda p, **_: check(p, cuda_unsupported=True)
    batches = cases.on_device(random_batches(11, 9))
    assert kinds_in_steps(cases.make_trainer(mlps="adagrad"), batches) == set()
    optimizers.has_fused_adagrad = lambda device: True
    with pytest.raises(RuntimeError, match="fused"):
        cases.trained(cases.make_trainer(mlps="adagrad"), batches)


def a_learning_rate_that_the_host_asks_for() -> None:
    """An optimiser that is not fused, as peers in benchmarks have, gets a number (T8)."""
    batches = cases.on_device(random_batches(12, 9))
    trainer = cases.make_trainer()
    trainer.optimizer = torch.optim.SGD(trainer.model.dense_parameters(), lr=0.0)
    assert kinds_in_steps(trainer, batches) == set()
    training.takes_lr_tensor = lambda optimizer: True
    assert kinds_in_steps(trainer, batches) == {"waits"}


def tables_that_draw_from_two_generators() -> None:
    """Those in host memory from the CPU's (T4)."""
    cases.placements()
    real = embedding.initial_rows
    embedding._Tables._draw = lambda self: [
        table[begin : begin + len(rows)].copy_(rows)
        for table in self.tables() for begin, rows in real(len(table), self.dim, table.device)
    ]  # fmt: skip
    with pytest.raises(AssertionError):
        cases.placements()


def full_batches_without_a_graph() -> None:
    """A short batch comes first and takes the only slots (T13)."""
    replays, real = [], CUDAGraph.replay
    CUDAGraph.replay = lambda self: replays.append(1) or real(self)
    batches = cases.short_first(20, 9)
    for most, expected in ((4, True), (1, False)):
        graph.MOST_SIZES = most
        trainer = cases.make_trainer()
        trainer.use_cuda_graphs()
        cases.trained(trainer, batches)
        full = sum(len(batch.label) == 9 for batch in batches) - graph.WARM_UP
        assert (len(replays) >= full) == expected
        replays.clear()


def a_number_that_the_graph_keeps() -> None:
    """A learning rate that is a number when the step is recorded stays what it was then."""
    ends = {}
    batches = cases.on_device(random_batches(14, 9))
    for what in ("eager", "graph", "number"):
        trainer = cases.make_trainer()
        if what != "eager":
            trainer.use_cuda_graphs()
        if what == "number":
            training.takes_lr_tensor = lambda optimizer: False
        cases.trained(trainer, batches)
        ends[what] = cases.weights(trainer)
    assert all(map(torch.equal, ends["eager"], ends["graph"]))
    assert not all(map(torch.equal, ends["eager"], ends["number"]))


def tables_in_memory_that_is_not_pinned() -> None:
    """Kernels reach host memory only where it is."""
    embedding._pinned = lambda weight, owner: weight
    trainer = cases.make_trainer(storage=Storage(placement="host"))
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        trainer.step(cases.on_device(random_batches(1, 9))[0])


SEEDS = [
    *ASKING, a_scan_that_one_block_does, copies_from_pageable_memory,
    streams_without_an_order, memory_given_away_too_early, tensors_of_two_devices,
    types_that_no_kernel_was_compiled_for, fused_adagrad_taken_for_granted,
    a_learning_rate_that_the_host_asks_for, tables_that_draw_from_two_generators,
    full_batches_without_a_graph, a_number_that_the_graph_keeps, tables_in_memory_that_is_not_pinned,
]  # fmt: skip


def apart(seed) -> bool:
    """Run one in a process of its own, as it changes the project's code; whether it ended well."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        torch.manual_seed(0)
        seed()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    wanted = [seed for seed in SEEDS if seed.__name__ in sys.argv[1:] or not sys.argv[1:]]
    missed = [seed.__name__ for seed in wanted if not apart(seed)]
    sys.exit(f"not found: {', '.join(missed)}" if missed else None)
