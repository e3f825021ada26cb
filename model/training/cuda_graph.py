"""The whole step as one CUDA graph: recorded once, then started by a single launch.

`Static` is the eager twin: it does everything but record, on any device, so the hand-over of batches can be tested
without a GPU. Both hold a function batch -> tensor, as Trainer.run and Trainer.logits are.
"""

import sys
from collections.abc import Callable

import torch

from model.config import ConfigError

SLOTS = 2  # one is being worked on, the next is being filled
WARM_UP = 3  # runs before recording: libraries allocate what they need on their first ones
MOST_SIZES = 4  # of batches that get slots and graphs: full ones, an epoch's last, and some to spare


class StaticInputs:
    """Batches at fixed addresses: SLOTS sets of tensors, filled in turns.

    A batch from the host (in pinned memory: of other memory the host makes a copy first) is copied on a stream of its
    own, while the device works on the one before; a slot is filled again only after the work on it is done.
    """

    def __init__(self, example, device: torch.device):
        self.slots = [type(example)(*(torch.empty_like(t, device=device) for t in example)) for _ in range(SLOTS)]
        self._last, self._cuda = SLOTS - 1, device.type == "cuda"
        if self._cuda:
            self._copier = torch.cuda.Stream(device)
            # The allocator may give out memory that work under way on this stream still uses: good for it, not for the
            # stream that copies.
            self._copier.wait_stream(torch.cuda.current_stream())
            self._free = [torch.cuda.Event() for _ in self.slots]

    def put(self, batch) -> int:
        """Copy a batch in; returns its slot. Work queued after this call sees all of it."""
        slot = self._last = (self._last + 1) % SLOTS
        if not self._cuda or batch[0].is_cuda:
            self._copy(slot, batch)
            return slot
        with torch.cuda.stream(self._copier):
            self._copier.wait_event(self._free[slot])
            self._copy(slot, batch)
        torch.cuda.current_stream().wait_stream(self._copier)
        return slot

    def _copy(self, slot: int, batch) -> None:
        for ours, theirs in zip(self.slots[slot], batch, strict=True):
            ours.copy_(theirs, non_blocking=True)

    def done(self, slot: int) -> None:
        """All work on the slot is queued: what comes after it may fill the slot again."""
        if self._cuda:
            self._free[slot].record()


class Static:
    """Runs a function on batches at fixed addresses, a set of them for each of the first MOST_SIZES sizes of batches;
    others go the direct way, which is said."""

    def __init__(self, run: Callable, device: torch.device):
        self._run, self._device = run, device
        self._inputs: dict[int, StaticInputs] = {}
        self._said = False

    def __call__(self, batch) -> torch.Tensor:
        """What the function returns, in memory of its own."""
        rows = len(batch.label)
        if rows not in self._inputs:
            if len(self._inputs) == MOST_SIZES:
                self._say(rows)
                return self._run(type(batch)(*(tensor.to(self._device) for tensor in batch)))
            self._inputs[rows] = StaticInputs(batch, self._device)
        slot = self._inputs[rows].put(batch)
        found = self._work(rows, slot)
        self._inputs[rows].done(slot)
        return found

    def _say(self, rows: int) -> None:
        if not self._said:
            known = ", ".join(map(str, self._inputs))
            print(f"--cuda_graphs: batches of {rows} rows run without a graph, as do all but those of {known}",
                  file=sys.stderr)  # fmt: skip
        self._said = True

    def _work(self, rows: int, slot: int) -> torch.Tensor:
        return self._run(self._inputs[rows].slots[slot])


class Graph(Static):
    """The same, recorded as a CUDA graph per slot after a few runs of that size. What the function computes, it must
    compute on the device alone. Raises ConfigError where it cannot be recorded."""

    def __init__(self, run: Callable, device: torch.device):
        if device.type != "cuda":
            raise ConfigError(f"--cuda_graphs: expected a GPU, got --device {device.type}; leave the flag out")
        super().__init__(run, device)
        self._runs: dict[int, int] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        # Shared: graphs run one after the other, and nothing but their results outlives them.
        self._pool, self._side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def _work(self, rows: int, slot: int) -> torch.Tensor:
        self._runs[rows] = self._runs.get(rows, 0) + 1
        if self._runs[rows] <= WARM_UP:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                found = super()._work(rows, slot)
            torch.cuda.current_stream().wait_stream(self._side)
            found.record_stream(torch.cuda.current_stream())
            return found
        if (rows, slot) not in self._graphs:
            self._graphs[rows, slot] = self._record(rows, slot)
        graph, found = self._graphs[rows, slot]
        graph.replay()
        return found.clone()  # the graphs share their memory

    def _record(self, rows: int, slot: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread only: meanwhile the loader's thread may pin memory or wait for an event, which is fine.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = super()._work(rows, slot)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"--cuda_graphs: this step cannot be recorded, as something in it waits for the device ({error}); "
                "leave the flag out, or train the tables with --embedding_optimizer sgd"
            ) from error
        return graph, found
