"""Seeded shuffle of more rows than memory holds: sort by a random key, bucket by bucket.

Row r gets a 64-bit key that depends on the seed and r alone; rows come out in the order of their keys. A bucket is a
range of keys, so the number of buckets (the memory used) never changes the order. See Rao 1961, Sandelius 1962.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu_etl.jit import compiled
from gpu_etl.schema import COLUMNS, RECORD_DTYPE

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
KEYED = np.dtype([("key", "<u8"), ("record", RECORD_DTYPE, (COLUMNS,))])
BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 512  # open files; beyond this, buckets grow instead


@compiled
def mix64(x):
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _keys(seed, first_row, keys):
    start = mix64(mix64(seed) + GOLDEN_GAMMA)
    for i in range(len(keys)):
        keys[i] = mix64(start + GOLDEN_GAMMA * np.uint64(first_row + i))


def row_keys(seed: int, first_row: int, rows: int) -> np.ndarray:
    """Sort keys uint64 [rows] of rows first_row, first_row + 1, ...; all keys of one seed are distinct."""
    keys = np.empty(rows, np.uint64)
    _keys(np.uint64(seed % 2**64), np.uint64(first_row), keys)
    return keys


class Shuffler:
    """Takes `rows` records in order, gives them back shuffled; one bucket at a time is in memory, twice."""

    def __init__(self, folder: Path, rows: int, seed: int, bucket_bytes: int = BUCKET_BYTES):
        self._seed = seed
        self._seen = 0
        buckets = min(MAX_BUCKETS, max(1, -(-rows * KEYED.itemsize // bucket_bytes)))
        self._paths = [folder / f"bucket_{b}" for b in range(buckets)]
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 - closed in close()

    def add(self, records: np.ndarray) -> None:
        """Take the next records, int32 [n, 40]."""
        keyed = np.empty(len(records), KEYED)
        keyed["key"] = row_keys(self._seed, self._seen, len(records))
        keyed["record"] = records
        self._seen += len(records)
        if len(self._files) == 1:
            keyed.tofile(self._files[0])
            return
        # High 32 bits times the number of buckets, divided by 2^32: equal ranges of keys, without a division.
        bucket = (keyed["key"] >> np.uint64(32)) * np.uint64(len(self._files)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket.astype(np.int64), minlength=len(self._files)))
        for file, begin, end in zip(self._files, [0, *ends[:-1]], ends, strict=True):
            keyed[order[begin:end]].tofile(file)

    def shuffled(self) -> Iterator[np.ndarray]:
        """All records in their new order, one bucket after the other; each bucket's file is deleted once read."""
        self.close()
        for path in self._paths:
            keyed = np.fromfile(path, KEYED)
            path.unlink()
            yield keyed["record"][np.argsort(keyed["key"])]

    def close(self) -> None:
        """Close the bucket files."""
        for file in self._files:
            file.close()
