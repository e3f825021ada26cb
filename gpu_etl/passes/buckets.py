"""Seeded shuffle of more rows than memory holds: sort by a random key, bucket by bucket.

Row r gets a 64-bit key that depends on the seed and r alone; rows come out in the order of their keys. A bucket is a
range of keys, so the number of buckets (the memory used) never changes the order. See Rao 1961, Sandelius 1962.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from gpu_etl.common.append import Appended
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import WorkDamagedError
from gpu_etl.common.threads import ALONE, nothing, prefetch
from gpu_etl.rows.numbered import DAY_SHIFT, NUMBERED

MAX_BUCKETS = 512  # files of a work folder; beyond this, buckets grow instead
TAIL_ROWS = 1 << 12
READ_BYTES = 1 << 20  # of a bucket, at least, by one reader


def bucket_count(rows: int, bucket_bytes: int) -> int:
    """How many buckets of about so many bytes so many rows take."""
    return min(MAX_BUCKETS, max(1, -(-rows * NUMBERED.itemsize // bucket_bytes)))


class Buckets:
    """Takes numbered rows in any order, gives them back in the order of their keys, a bucket at a time.

    kept: of each day, the rows that an earlier run has surely brought; later ones are dropped. None: all were brought,
    and some buckets taken out again. first_row: of the rows that are brought of a day. paths: of the buckets' files;
    sums: uint64 [count], kept by whoever brings rows (integrity.py). Raises WorkDamagedError where rows are missing.

    crew: its threads write, each to a range of buckets, and read, each a range of one. For the owner to set.
    """

    crew = ALONE

    def __init__(self, folder: Path, count: int, seed: int, kept: list[int] | None, first_row: int = 0):
        self.seed = seed
        self.paths = [folder / f"bucket_{b}" for b in range(count)]
        self.sums = np.zeros(count, np.uint64)
        if kept is None:
            self._files = Appended([])
            return
        left = sum(_cut_back(path, np.array(kept) + first_row) for path in self.paths)
        if count and left != sum(kept):
            raise WorkDamagedError(
                f"{folder}: expected {sum(kept)} rows in shuffle buckets, found {left}: not what that run's journal "
                "says (did the machine stop?)"
            )
        self._files = Appended(self.paths)

    def add(self, numbered: np.ndarray, ends: np.ndarray) -> None:
        """Take what group() made. It is with the kernel on return."""
        crew = self.crew
        rows, begins = len(numbered), np.concatenate([[0], ends[:-1]])
        cuts = np.searchsorted(ends, np.arange(1, crew.threads) * rows // crew.threads, side="right")
        ranges = pairwise([0, *np.maximum.accumulate(cuts).tolist(), len(ends)])

        def write(first: int, last: int) -> None:
            places = begins[first:last].tolist(), ends[first:last].tolist()
            for bucket, begin, end in zip(range(first, last), *places, strict=True):
                if begin < end:
                    self._files.append(bucket, numbered[begin:end])

        crew.run([partial(write, *buckets) for buckets in ranges if buckets[0] < buckets[1]])

    def rows(self) -> list[int]:
        """How many rows each bucket holds."""
        return [path.stat().st_size // NUMBERED.itemsize for path in self.paths]

    def read(self, bucket: int, memory: ScratchBuffer) -> np.ndarray:
        """A bucket's rows, NUMBERED, as they came; they lie in `memory`."""
        crew, path = self.crew, self.paths[bucket]
        numbered = memory.empty((path.stat().st_size // NUMBERED.itemsize,), NUMBERED)
        view = memoryview(numbered.view(np.uint8))
        share = max(READ_BYTES, -(-len(view) // crew.threads))
        with open(path, "rb", buffering=0) as file:
            begins = range(0, len(view), share)
            crew.run([partial(_read_at, file.fileno(), view[begin : begin + share], begin) for begin in begins])
        return numbered

    def whole(
        self, start: int, memory: list[ScratchBuffer], initializer: Callable[[], None] = nothing
    ) -> Iterator[np.ndarray]:
        """Bucket by bucket from `start` on, its rows (NUMBERED). memory: three, of one in use, one ready, one being
        read: bucket b lies in memory[b % 3]; initializer: what the thread that reads begins with."""
        self.close()
        found = (self.read(bucket, memory[bucket % 3]) for bucket in range(start, len(self)))
        return prefetch(found, 1, initializer)

    def remove(self, bucket: int) -> None:
        """Delete a bucket's file, if it is still there."""
        self.paths[bucket].unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.paths)

    def close(self) -> None:
        """Close the bucket files."""
        self._files.close()


def _read_at(descriptor: int, view: memoryview, begin: int) -> None:
    """Fill the view with what a file holds from byte `begin` on, as far as it goes."""
    while view and (count := os.preadv(descriptor, [view], begin)):
        view, begin = view[count:], begin + count


def _cut_back(path: Path, kept: np.ndarray) -> int:
    """Drop the rows at the end of a bucket's file with numbers of `kept` and higher; returns how many rows stay.

    Only rows brought last can be of that kind: those of a slab that is not in the journal.
    """
    path.touch()
    count = path.stat().st_size // NUMBERED.itemsize
    while count:
        first = max(0, count - TAIL_ROWS)
        numbers = np.fromfile(path, NUMBERED, count - first, offset=first * NUMBERED.itemsize)["row"]
        days = numbers >> DAY_SHIFT  # torn or damaged rows may have any number
        known = (days >= 0) & (days < len(kept))
        surely = np.flatnonzero(known & ((numbers & ((1 << DAY_SHIFT) - 1)) < kept[np.where(known, days, 0)]))
        if len(surely):
            count = first + int(surely[-1]) + 1
            break
        count = first
    os.truncate(path, count * NUMBERED.itemsize)
    return count
