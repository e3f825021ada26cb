"""Seeded shuffle of more rows than memory holds: sort by a random key, bucket by bucket.

Row r gets a 64-bit key that depends on the seed and r alone; rows come out in the order of their keys. A bucket is a
range of keys, so the number of buckets (the memory used) never changes the order. See Rao 1961, Sandelius 1962.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np

from gpu_etl.errors import WorkDamagedError
from gpu_etl.jit import compiled, compiled_parallel
from gpu_etl.memory import Reused
from gpu_etl.prefetch import ALONE, nothing, prefetch
from gpu_etl.schema import COLUMNS
from gpu_etl.spill import DAY_SHIFT, NUMBERED, Appended

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MAX_BUCKETS = 512  # files of a work folder; beyond this, buckets grow instead
TAIL_ROWS = 1 << 12
READ_BYTES = 1 << 20  # of a bucket, at least, by one reader
NUMBER_WORDS = 2  # a numbered row as 32-bit words: the number, low half first, then the row


@compiled
def mix64(x):
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def start_of_keys(seed):
    """What the keys of a seed (uint64) begin with."""
    return mix64(mix64(seed) + GOLDEN_GAMMA)


@compiled
def key_of(start, row):
    """Sort key, uint64, of the row with that number; start: start_of_keys(seed)."""
    return mix64(start + GOLDEN_GAMMA * np.uint64(row))


@compiled
def bucket_of(key, buckets):
    """Equal ranges of keys, without a division: the key's high 32 bits times the number of buckets, over 2^32."""
    return np.int64((key >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32))


@compiled
def _keys(seed, rows, keys):
    """keys[i] = sort key of the row with number rows[i]."""
    start = start_of_keys(seed)
    for i in range(len(rows)):
        keys[i] = key_of(start, rows[i])


def keys_of(seed: int, rows: np.ndarray) -> np.ndarray:
    """Sort keys uint64 [n] of the rows with these numbers, int64 [n]; all keys of one seed are distinct."""
    keys = np.empty(len(rows), np.uint64)
    _keys(np.uint64(seed % 2**64), np.ascontiguousarray(rows), keys)
    return keys


def row_keys(seed: int, first_row: int, rows: int) -> np.ndarray:
    """Sort keys uint64 [rows] of rows first_row, first_row + 1, ..."""
    return keys_of(seed, np.arange(first_row, first_row + rows))


@compiled
def _places(keys, ends, places):
    """places[row] = where it goes, so that rows are grouped by bucket: b's come to lie at ends[b - 1] to ends[b]."""
    ends[:] = 0
    for row in range(len(keys)):
        ends[bucket_of(keys[row], len(ends))] += 1
    next_place = np.cumsum(ends) - ends
    ends[:] = np.cumsum(ends)
    for row in range(len(keys)):
        bucket = bucket_of(keys[row], len(ends))
        places[row] = next_place[bucket]
        next_place[bucket] += 1


@compiled_parallel
def _scatter(coded, first_row, places, words):
    for row in numba.prange(len(places)):
        place = np.uint64(places[row])
        number = first_row + row
        words[place, 0] = number & 0xFFFFFFFF
        words[place, 1] = number >> 32
        for column in range(COLUMNS):
            words[place, NUMBER_WORDS + column] = coded[row, column]


def group(
    coded: np.ndarray, first_row: int, seed: int, buckets: int, memory: Reused
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (32-bit integers [n, 40], numbered from first_row on) by bucket, for Buckets.add.

    Returns them as NUMBERED [n], in `memory`, and int64 [buckets]: where each bucket's rows end.
    """
    numbered = memory.empty((len(coded),), NUMBERED)
    ends, places = np.empty(buckets, np.int64), np.empty(len(coded), np.int64)
    _places(row_keys(seed, first_row, len(coded)), ends, places)
    _scatter(coded.view(np.uint32), first_row, places, numbered.view(np.uint32).reshape(-1, NUMBER_WORDS + COLUMNS))
    return numbered, ends


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

    def read(self, bucket: int, memory: Reused) -> np.ndarray:
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
        self, start: int, memory: list[Reused], initializer: Callable[[], None] = nothing
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
