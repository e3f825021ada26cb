"""Pseudo-random keys of rows: 64 bits that depend on a seed and the row's number alone (splitmix64)."""

import numpy as np

from gpu_etl.jit import compiled

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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
