"""The values that a slab brings to the dictionaries, on their way to the host.

Each slab's keys are copied while the next slab is computed on. How many there are is known only on the device: as many
as one slab has brought so far are copied at once, and where that was too few, all are copied again.
"""

import threading

import numpy as np
from numba import cuda

from gpu_etl.cuda_kernel import blocks_for, kernel
from gpu_etl.cuda_launch import Mark, Memory, Output, Pinned, copy_now, fetch, launch
from gpu_etl.schema import SPARSE


@kernel("int32[::1]", "int64")
def zero(array, count):
    """array[:count] = 0"""
    i = cuda.grid(1)
    if i < count:
        array[i] = 0


class Batch:
    """The keys of one slab. asked: whether somebody will ask for them."""

    def __init__(self):
        self._host, self._number, self._lock = Pinned(np.uint32), Output(np.int32), threading.Lock()
        self.asked, self._found = False, [np.empty(0, np.uint32)] * SPARSE

    def start(self, new: "NewKeys") -> None:
        """Copy the counts, and as many keys as one slab has brought so far, behind the kernels launched so far."""
        self._new, self._expected = new, min(new.expected, new.device.items)
        self._arrived = self._number.get(new.count)
        host = self._host.take(self._expected)
        self._wait = fetch(new.device.array[: self._expected], host, new.mark) if self._expected else None
        self._kept, self._found, self.asked = host, None, False

    def number(self) -> np.ndarray:
        """How many there are of each column, int64 [26]."""
        return self._arrived().astype(np.int64)

    def is_short(self) -> bool:
        """Whether there are more than were copied at once."""
        return self._found is None and int(self.number().sum()) > self._expected

    def keys(self) -> list[np.ndarray]:
        """26 arrays uint32, on the host; waits for them."""
        with self._lock:
            if self._found is None:
                each = self.number()
                number = int(each.sum())
                if self._wait is not None:
                    self._wait()
                keys = self._kept[:number].copy()
                if number > self._expected:
                    keys = copy_now(self._new.device.array[:number])
                    self._new.expected = max(self._new.expected, number)
                self._found = np.split(keys, np.cumsum(each)[:-1])
            return self._found


class NewKeys:
    """Where kernels put a slab's keys: count int32 [26], how many of each column; device.array uint32, column by
    column; mark: behind the last copy of them. started: the batch of the last slab, until its counts are taken in."""

    def __init__(self):
        self.device, self._counts, self.mark = Memory("slab", np.uint32), Memory("slab", np.int32), Mark()
        self.count, self.expected = self._counts.take(SPARSE), 0
        self.started: Batch | None = None
        self._batches = [Batch(), Batch()]

    def begin(self, most: int) -> Batch:
        """Make room for a slab's keys, which are written behind this call; its batch is not started yet."""
        self._batches.reverse()
        self.started = self._batches[0]
        self.started.keys()  # of the slab before the last: they came long ago, and the memory is used again
        self.mark.hold("compute")
        self.device.take(most)
        launch(zero, blocks_for(SPARSE), self.count, SPARSE)
        return self.started
