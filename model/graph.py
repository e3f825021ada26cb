"""The whole step as one CUDA graph: recorded once, then started by a single launch.

`Static` is the eager twin: it does everything but record, on any device, so the hand-over of batches can be tested
without a GPU. Both hold a function batch -> tensor, as Trainer.run and Trainer.logits are.
"""

from collections.abc import Callable

import torch

from model.config import ConfigError

SLOTS = 2  # one is being worked on, the next is being filled
WARM_UP = 3  # runs before recording: libraries allocate what they need on their first ones


class StaticInputs:
    """Batches at fixed addresses: SLOTS sets of tensors, filled in turns.

    A batch from the host is copied on a stream of its own, while the device works on the one before; a slot is filled
    again only after the work on it is done.
    """

    def __init__(self, example, device: torch.device):
        self.slots = [type(example)(*(torch.empty_like(t, device=device) for t in example)) for _ in range(SLOTS)]
        self._last, self._cuda = SLOTS - 1, device.type == "cuda"
        if self._cuda:
            self._copier = torch.cuda.Stream(device)
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
    """Runs a function on batches at fixed addresses. Batches of another size than the first one's go the direct way."""

    def __init__(self, run: Callable, device: torch.device):
        self._run, self._device = run, device
        self._inputs: StaticInputs | None = None

    def __call__(self, batch) -> torch.Tensor:
        """What the function returns, in memory of its own."""
        if self._inputs is None:
            self._inputs = StaticInputs(batch, self._device)
        if len(batch.label) != len(self._inputs.slots[0].label):
            return self._run(type(batch)(*(tensor.to(self._device) for tensor in batch)))
        slot = self._inputs.put(batch)
        found = self._work(slot)
        self._inputs.done(slot)
        return found

    def _work(self, slot: int) -> torch.Tensor:
        return self._run(self._inputs.slots[slot])


class Graph(Static):
    """The same, recorded as a CUDA graph per slot after a few runs. What the function computes, it must compute on the
    device alone. Raises ConfigError where it cannot be recorded."""

    def __init__(self, run: Callable, device: torch.device):
        if device.type != "cuda":
            raise ConfigError(f"--cuda_graphs: expected a GPU, got --device {device.type}; leave the flag out")
        super().__init__(run, device)
        self._runs, self._graphs, self._pool = 0, {}, torch.cuda.graph_pool_handle()

    def _work(self, slot: int) -> torch.Tensor:
        self._runs += 1
        if self._runs <= WARM_UP:
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = super()._work(slot)
            torch.cuda.current_stream().wait_stream(side)
            return found
        if slot not in self._graphs:
            self._graphs[slot] = self._record(slot)
        graph, found = self._graphs[slot]
        graph.replay()
        return found.clone()  # the graphs share their memory

    def _record(self, slot: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread only: meanwhile the loader's thread may pin memory or wait for an event, which is fine.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = super()._work(slot)
        except RuntimeError as error:
            raise ConfigError(
                f"--cuda_graphs: this step cannot be recorded, as something in it waits for the device ({error}); "
                "leave the flag out, or train the tables with --embedding_optimizer sgd"
            ) from error
        return graph, found
