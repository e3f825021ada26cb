"""Where the time of training goes (leaf)."""

import time
from contextlib import contextmanager

import torch

SAMPLED_STEPS = 20  # on a GPU, one step of so many is timed: timing it means waiting for it


class Clock:
    """Seconds by part of the loop. On a GPU only some steps are timed, and their parts stand for all."""

    def __init__(self, device: torch.device):
        self._device, self._steps = device, 0
        self._timed = True
        self.seconds: dict[str, float] = {}

    def next_step(self) -> None:
        """A new step begins."""
        self._steps += 1
        self._timed = self._device.type != "cuda" or self._steps % SAMPLED_STEPS == 0

    @contextmanager
    def part(self, name: str):
        """Time a part of the step; a part within a part counts for the outer one alone."""
        if not self._timed:
            yield
            return
        self._wait()
        start, self._timed = time.perf_counter(), False
        try:
            yield
        finally:
            self._timed = True
        self._wait()
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were timed elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def shares(self) -> dict[str, float]:
        """Each part's share of the time of all parts."""
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()} if total else {}
