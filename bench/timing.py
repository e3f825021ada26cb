"""Seconds of work; on a GPU by events in its stream, so that nothing waits between pieces of work."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call of `calls` in a row."""
    laps = Laps(device)
    for _ in range(calls):
        work()
    laps.mark()
    (taken,) = laps.take()
    return taken / calls


class Laps:
    """Seconds between marks; the first is made at once. On a GPU a mark is the moment when it has done all work queued
    before."""

    def __init__(self, device: torch.device):
        self._cuda, self._marks = device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        """A lap ends, the next begins."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def take(self) -> list[float]:
        """Seconds of the laps so far. The next lap begins now, after the wait for the device."""
        marks, self._marks = self._marks, []
        if self._cuda:
            marks[-1].synchronize()
            found = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        else:
            found = [b - a for a, b in pairwise(marks)]
        self.mark()
        return found
