"""Coded rows on a GPU: into shuffle buckets, and from there into records."""

import math
from collections.abc import Callable

import numpy as np
from numba import cuda

from gpu_etl import rows
from gpu_etl.cuda_launch import (
    THREADS,
    Behind,
    blocks_for,
    budget,
    download,
    empty,
    fetch,
    launch,
    sorted_places,
    upload_array,
)
from gpu_etl.memory import Reused
from gpu_etl.schema import COLUMNS, FIRST_SPARSE, RECORD_DTYPE, SPARSE
from gpu_etl.shuffle import NUMBER_WORDS, bucket_of, key_of, start_of_keys
from gpu_etl.spill import NUMBERED

FINISH_BYTES = 2 * NUMBERED.itemsize + 4 * 8  # of a row: coded, record, number, key, shift, place


@cuda.jit
def _count_buckets(start, first_row, buckets, places, counts):
    """counts[b] = rows of bucket b; places[row] = its bucket."""
    row = cuda.grid(1)
    if row < len(places):
        bucket = bucket_of(key_of(start, first_row + row), buckets)
        places[row] = bucket
        cuda.atomic.add(counts, bucket, 1)


@cuda.jit
def _take_places(places, begins):
    """places[row]: its bucket -> a place of its own in that bucket. Rows of a bucket may come in any order."""
    row = cuda.grid(1)
    if row < len(places):
        places[row] = cuda.atomic.add(begins, places[row], 1)


@cuda.jit
def _scatter(values, first_row, places, words):
    """words[places[row]] = number and row: as shuffle._scatter. Thread i of the grid's y-th row writes word y."""
    row, word = cuda.grid(1), cuda.blockIdx.y
    if row < len(places):
        number = first_row + row
        if word == 0:
            words[places[row], 0] = number & 0xFFFFFFFF
        elif word == 1:
            words[places[row], 1] = number >> 32
        else:
            words[places[row], word] = values[row, word - NUMBER_WORDS]


def group(
    values, first_row: int, seed: int, buckets: int, memory: Reused
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Brings a coded slab's rows by bucket to the host: see cpu.group; only the order within a bucket is another."""
    n = len(values)
    numbered = memory.empty((n,), NUMBERED)
    if not n:
        return lambda: (numbered, np.zeros(buckets, np.int64))
    places, counts = empty(n, np.int64), upload_array(np.zeros(buckets, np.int32))
    start = start_of_keys(np.uint64(seed % 2**64))
    launch(_count_buckets, blocks_for(n), start, first_row, buckets, places, counts)
    ends = np.cumsum(download(counts).astype(np.int64))
    launch(_take_places, blocks_for(n), places, upload_array(np.concatenate([[0], ends[:-1]])))
    words = empty((n, NUMBER_WORDS + COLUMNS), np.uint32)
    launch(_scatter, (blocks_for(n), NUMBER_WORDS + COLUMNS), values, first_row, places, words)
    wait = fetch(words, numbered.view(np.uint32).reshape(n, -1))

    def arrived() -> tuple[np.ndarray, np.ndarray]:
        wait()
        return numbered, ends

    return arrived


def rows_of(values, memory: Reused) -> Callable[[], np.ndarray]:
    """Brings a coded slab to the host as rows: see cpu.rows_of."""
    columns = memory.empty(values.shape[::-1], np.uint32).T
    wait = fetch(values, columns) if len(values) else lambda: None

    def arrived() -> np.ndarray:
        wait()
        return np.ascontiguousarray(columns.view(RECORD_DTYPE))

    return arrived


@cuda.jit
def _keys(start, numbers, keys):
    row = cuda.grid(1)
    if row < len(numbers):
        keys[row] = key_of(start, numbers[row])


def shuffled(numbers: np.ndarray, seed: int):
    """The order of rows with these numbers, int64 [n] on the host, by their keys: places int64 [n] on the device."""
    if not len(numbers):
        return empty(0, np.int64)
    keys = empty(len(numbers), np.uint64)
    start = start_of_keys(np.uint64(seed % 2**64))
    launch(_keys, blocks_for(len(numbers)), start, upload_array(np.ascontiguousarray(numbers)), keys)
    return sorted_places(keys)


@cuda.jit
def _finish(coded, order, shifts, ids, base, records):
    """Thread i of the grid's y-th row writes column y of record i. coded: words of numbered rows, or rows."""
    i, column = cuda.grid(1), cuda.blockIdx.y
    if i < len(order):
        row = order[i]
        value = np.int64(coded[row, coded.shape[1] - COLUMNS + column])
        if column >= FIRST_SPARSE:
            records[i, column] = ids[base[column - FIRST_SPARSE] + value]
        elif column > 0:
            records[i, column] = rows.dense_value(value, False, shifts[row], 0)
        else:
            records[i, column] = value


class Finisher:
    """See cpu.Finisher; ids lie on the device, and the rows taken."""

    def __init__(self, ids: tuple[np.ndarray, ...]):
        assert len(ids) == SPARSE
        budget.take("ids", sum(column.nbytes for column in ids))
        self._ids = upload_array(np.concatenate(ids))
        self._base = upload_array(np.cumsum([0] + [len(column) for column in ids[:-1]]))

    def take(self, coded: np.ndarray, shifts: np.ndarray, order=None) -> Callable[[], None]:
        """See cpu.Finisher; order: of shuffled()."""
        budget.take("rows to encode", FINISH_BYTES * len(coded))
        self._coded, self._shifts = upload_array(coded), upload_array(shifts)
        copied = Behind("compute")
        self._order = upload_array(np.arange(len(coded))) if order is None else order
        return copied.synchronize

    def finish(self, begin: int, end: int, records: np.ndarray) -> Callable[[], np.ndarray]:
        """See cpu.Finisher."""
        if begin == end:
            return lambda: records
        found = empty(records.shape, RECORD_DTYPE)
        grid = math.ceil((end - begin) / THREADS), COLUMNS
        launch(_finish, grid, self._coded, self._order[begin:end], self._shifts, self._ids, self._base, found)
        wait = fetch(found, records)

        def arrived() -> np.ndarray:
            wait()
            return records

        return arrived
