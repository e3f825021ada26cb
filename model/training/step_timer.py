"""Where the time of training goes."""

import time
from collections import deque
from contextlib import contextmanager

import torch

SAMPLED_STEPS = 20  # on a GPU, one step of so many is timed


class StepTimer:
    """Seconds by part of the loop.

    On a GPU one step of `every` is timed, and its parts stand for all. Two events in the stream mark a part, so that
    nothing waits for the device: its time is the GPU's, which for a part that only the host works in ("waiting for
    data") is the time that the GPU had nothing to do in.
    """

    def __init__(self, device: torch.device, every: int = SAMPLED_STEPS):
        self._cuda, self._steps, self.every = device.type == "cuda", 0, every
        self._timed = not self._cuda  # the first wait for data is that for a loader to start
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def next_step(self) -> None:
        """A new step begins."""
        self._steps += 1
        self._timed = not self._cuda or self._steps % self.every == 0
        while self._pending and self._pending[0][2].query():
            self._count()

    @contextmanager
    def part(self, name: str):
        """Time a part of the step; a part within a part counts for the outer one alone."""
        if not self._timed:
            yield
            return
        start, self._timed = self._now(), False
        try:
            yield
        finally:
            self._timed = True
        if self._cuda:
            self._pending.append((name, start, self._now()))
        else:
            self.add(name, time.perf_counter() - start)

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self) -> None:
        name, start, end = self._pending.popleft()
        self.add(name, start.elapsed_time(end) / 1000)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were timed elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By part; on a GPU, waits for the parts under way."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._count()
        return dict(self._seconds)

    def clear(self) -> None:
        """Forget what was timed so far."""
        self._pending.clear()
        self._seconds.clear()

    def shares(self) -> dict[str, float]:
        """Each part's share of the time of all parts."""
        found = self.seconds
        total = sum(found.values())
        return {name: seconds / total for name, seconds in found.items()} if total else {}
