"""Seeded shuffle of more rows than memory holds: sort by a random key, bucket by bucket.

Row r gets a 64-bit key that depends on the seed and r alone; rows come out in the order of their keys. A bucket is a
range of keys, so the number of buckets (the memory used) never changes the order. See Rao 1961, Sandelius 1962.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np

from gpu_etl.jit import compiled, compiled_parallel
from gpu_etl.prefetch import prefetch
from gpu_etl.schema import COLUMNS, RECORD_DTYPE
from gpu_etl.spill import append

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
NUMBERED = np.dtype([("row", "<i8"), ("record", RECORD_DTYPE, (COLUMNS,))])
BUCKET_BYTES = 16 << 20
MAX_BUCKETS = 512  # open files; beyond this, buckets grow instead


@compiled
def mix64(x):
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _keys(seed, rows, keys):
    """keys[i] = sort key of the row with number rows[i]."""
    start = mix64(mix64(seed) + GOLDEN_GAMMA)
    for i in range(len(rows)):
        keys[i] = mix64(start + GOLDEN_GAMMA * np.uint64(rows[i]))


def keys_of(seed: int, rows: np.ndarray) -> np.ndarray:
    """Sort keys uint64 [n] of the rows with these numbers, int64 [n]; all keys of one seed are distinct."""
    keys = np.empty(len(rows), np.uint64)
    _keys(np.uint64(seed % 2**64), np.ascontiguousarray(rows), keys)
    return keys


def row_keys(seed: int, first_row: int, rows: int) -> np.ndarray:
    """Sort keys uint64 [rows] of rows first_row, first_row + 1, ..."""
    return keys_of(seed, np.arange(first_row, first_row + rows))


@compiled
def _partition(keys, records, first_row, ends, numbered):
    """Number the records and group them by bucket: b's go to numbered[ends[b - 1] : ends[b]], in order of rows."""
    buckets = np.uint64(len(ends))
    ends[:] = 0
    for row in range(len(keys)):
        ends[_bucket(keys[row], buckets)] += 1
    next_place = np.cumsum(ends) - ends
    ends[:] = np.cumsum(ends)
    for row in range(len(keys)):
        bucket = _bucket(keys[row], buckets)
        place = next_place[bucket]
        next_place[bucket] += 1
        numbered[place].row = first_row + row
        numbered[place].record[:] = records[row]


@compiled
def _bucket(key, buckets):
    """Equal ranges of keys, without a division: the key's high 32 bits times the number of buckets, over 2^32."""
    return np.int64((key >> np.uint64(32)) * buckets >> np.uint64(32))


@compiled_parallel
def _gather(numbered, order, records):
    for i in numba.prange(len(order)):
        records[i] = numbered[order[i]].record


class Shuffler:
    """Takes `rows` records in order, gives them back shuffled; two or three buckets are in memory.

    Each add() brings `step` rows, the last one what is left. Bucket files number their records, so that what a killed
    run has put there tells by itself how far it came: `taken` rows are safely there. `finished` says that all are, as
    the buckets cannot tell any more once the first of them is removed.
    """

    def __init__(
        self, folder: Path, rows: int, seed: int, step: int, finished: bool = False, bucket_bytes: int = BUCKET_BYTES
    ):
        self._seed = seed
        buckets = min(MAX_BUCKETS, max(1, -(-rows * NUMBERED.itemsize // bucket_bytes)))
        self._paths = [folder / f"bucket_{b}" for b in range(buckets)]
        self.taken = rows if finished else self._drop_unfinished(step)
        self._files = [open(path, "ab") for path in self._paths]  # noqa: SIM115 - closed in close()

    def _drop_unfinished(self, step: int) -> int:
        """Cut the buckets back to where all of them have everything; returns the number of rows they then hold."""
        last = -1
        for path in self._paths:
            path.touch()
            count = path.stat().st_size // NUMBERED.itemsize
            if count:
                last = max(last, int(np.fromfile(path, NUMBERED, 1, offset=(count - 1) * NUMBERED.itemsize)["row"][0]))
        whole = max(last, 0) // step * step  # rows from here on may be missing from some buckets
        for path in self._paths:
            count = path.stat().st_size // NUMBERED.itemsize
            rows = np.memmap(path, NUMBERED, "r", shape=count)["row"] if count else np.empty(0)
            os.truncate(path, int(np.searchsorted(rows, whole)) * NUMBERED.itemsize)
        return whole

    def add(self, records: np.ndarray) -> None:
        """Take the next records, int32 [n, 40]. They are with the kernel on return."""
        numbered = np.empty(len(records), NUMBERED)
        ends = np.empty(len(self._files), np.int64)
        _partition(row_keys(self._seed, self.taken, len(records)), records, self.taken, ends, numbered)
        self.taken += len(records)
        for file, begin, end in zip(self._files, [0, *ends[:-1]], ends, strict=True):
            append(file, numbered[begin:end])

    def shuffled(self, start: int = 0) -> Iterator[np.ndarray]:
        """All records in their new order, bucket by bucket from `start` on; remove() each once it is stored."""
        self.close()
        for numbered, order in prefetch(self._sorted(start), depth=1):
            records = np.empty((len(numbered), COLUMNS), RECORD_DTYPE)
            _gather(numbered, order, records)
            yield records

    def _sorted(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Buckets as they lie on disk, and the order in which their records come."""
        for path in self._paths[start:]:
            numbered = np.fromfile(path, NUMBERED)
            yield numbered, np.argsort(keys_of(self._seed, numbered["row"]))

    def remove(self, bucket: int) -> None:
        """Delete a bucket's file, if it is still there."""
        self._paths[bucket].unlink(missing_ok=True)

    def close(self) -> None:
        """Close the bucket files."""
        for file in self._files:
            file.close()
