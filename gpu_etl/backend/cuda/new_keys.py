"""The values that a slab brings to the dictionaries, on their way to the host.

Each slab's keys are copied while the next slab is computed on. How many there are is known only on the device: as many
as one slab has brought so far are copied at once, and where that was too few, all are copied again.
"""

import threading

import numpy as np
from numba import cuda

from gpu_etl.backend.cuda.kernel import blocks_for, kernel
from gpu_etl.backend.cuda.launch import Mark, Memory, Output, Pinned, copy_now, fetch, launch
from gpu_etl.schema import SPARSE


@kernel("int32[::1]", "int64")
def zero(array, count):
    """array[:count] = 0"""
    i = cuda.grid(1)
    if i < count:
        array[i] = 0


class Batch:
    """The keys of one slab, in pinned memory that a later slab's will use again; asked: whether somebody wants them."""

    def __init__(self, new: "NewKeys", host: Pinned, counts: Output):
        self.asked, self._new, self._expected = False, new, min(new.expected, new.device.items)
        self._arrived, self._host = counts.get(new.count), host.take(self._expected)
        self._wait = fetch(new.device.array[: self._expected], self._host, new.mark) if self._expected else None
        self._lock, self._keys = threading.Lock(), None

    def number(self) -> np.ndarray:
        """How many there are of each column, int64 [26]."""
        return self._arrived().astype(np.int64)

    def settle(self) -> np.ndarray:
        """The same, before the next slab's keys are written over these on the device."""
        number = self.number()
        if self.asked and int(number.sum()) > self._expected:
            self.keys()
        return number

    def keys(self) -> list[np.ndarray]:
        """26 arrays uint32, on the host; waits for them."""
        with self._lock:
            if self._keys is None:
                each = self.number()
                number = int(each.sum())
                if self._wait is not None:
                    self._wait()
                keys = self._host[:number].copy()
                if number > self._expected:
                    keys = copy_now(self._new.device.array[:number])
                    self._new.expected = max(self._new.expected, number)
                self._keys = np.split(keys, np.cumsum(each)[:-1])
            return self._keys


class NewKeys:
    """Where kernels put a slab's keys: count int32 [26], how many of each column; device.array uint32, column by
    column; mark: behind the last copy of them. started: the batch of the last slab, until its counts are taken in."""

    def __init__(self):
        self.device, self._counts, self.mark = Memory("slab", np.uint32), Memory("slab", np.int32), Mark()
        self.count, self.expected = self._counts.take(SPARSE), 0
        self._hosts = [(Pinned(np.uint32), Output(np.int32)) for _ in range(2)]
        self._batches: list[Batch | None] = [None, None]
        self.started: Batch | None = None

    def begin(self, most: int) -> None:
        """Make room for a slab's keys, which are written behind this call."""
        self.mark.hold("compute")
        self.device.take(most)
        launch(zero, blocks_for(SPARSE), self.count, SPARSE)

    def start(self) -> None:
        """Start to copy the counts, and as many keys as one slab has brought so far."""
        self._hosts.reverse(), self._batches.reverse()
        before_last = self._batches[0]
        if before_last is not None and before_last.asked:
            before_last.keys()  # they came long ago, and their memory is used again
        self._batches[0] = self.started = Batch(self, *self._hosts[0])
