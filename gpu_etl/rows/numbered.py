"""Rows with their numbers, as the shuffle keeps them, and how they are brought into buckets.

A row's number holds the place that it came from: the day's place among the inputs above DAY_SHIFT, the row's place
among those kept of that day below. So it does not depend on how far other days were read.
"""

import numba
import numpy as np

from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.jit import compiled, compiled_parallel
from gpu_etl.rows.random_keys import bucket_of, row_keys
from gpu_etl.schema import COLUMNS, RECORD_DTYPE

DAY_SHIFT = 40
NUMBERED = np.dtype([("row", "<i8"), ("coded", RECORD_DTYPE, (COLUMNS,))])
NUMBER_WORDS = 2  # a numbered row as 32-bit words: the number, low half first, then the row


def first_number(day: int) -> int:
    """Number of a day's first row."""
    return day << DAY_SHIFT


def words_of(numbered: np.ndarray) -> np.ndarray:
    """Rows NUMBERED [n], contiguous, as int32 [n, 42]: the number in the first two, the coded row behind it."""
    return numbered.view(RECORD_DTYPE).reshape(len(numbered), NUMBERED.itemsize // RECORD_DTYPE.itemsize)


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
    coded: np.ndarray, first_row: int, seed: int, buckets: int, memory: ScratchBuffer
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (32-bit integers [n, 40], numbered from first_row on) by bucket, for Buckets.add.

    Returns them as NUMBERED [n], in `memory`, and int64 [buckets]: where each bucket's rows end.
    """
    numbered = memory.empty((len(coded),), NUMBERED)
    ends, places = np.empty(buckets, np.int64), np.empty(len(coded), np.int64)
    _places(row_keys(seed, first_row, len(coded)), ends, places)
    _scatter(coded.view(np.uint32), first_row, places, numbered.view(np.uint32).reshape(-1, NUMBER_WORDS + COLUMNS))
    return numbered, ends
