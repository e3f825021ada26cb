"""The slab functions of cpu.py on a GPU: Numba kernels that call the same scalar functions of rows.py.

A slab's values, uint32 [n, 40] column-major, and missing, uint64 [n], stay on the device between the functions; only
faults, labels, counts and finished rows come back. Everything is integers, so the results are the CPU's, to the bit.
"""

import math

import numpy as np
from numba import cuda

from gpu_etl import rows
from gpu_etl.cpu import set_threads
from gpu_etl.cuda_dictionary import Dictionaries
from gpu_etl.cuda_launch import THREADS, blocks_for, budget, download, upload_array
from gpu_etl.errors import DataError
from gpu_etl.memory import Reused
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE, SPARSE
from gpu_etl.shuffle import NUMBER_WORDS, bucket_of, key_of, start_of_keys
from gpu_etl.spill import NUMBERED

__all__ = [
    "Dictionaries", "Finisher", "count_missing", "find_rows", "group", "integers", "keep_rows", "labels", "parse",
    "peak_device_bytes", "require_gpu", "rows_of", "set_memory_limit", "set_threads", "smallest", "upload",
]  # fmt: skip

# Bytes per byte of a slab's text: the text, row ends, values, missing and faults; new slots when it is coded; places
# and numbered rows when it is grouped. Rows have 200 bytes or more.
SLAB_FACTOR = 4
CHUNK_WORDS = 16  # of 8 bytes, of one thread in the newline scan


def require_gpu() -> None:
    """Raise DataError, with what to do, where Numba finds no GPU that it can use."""
    try:
        cuda.get_current_device()
    except Exception as error:  # Numba raises many kinds, down to one per missing library
        raise DataError(
            f"--device cuda: Numba finds no usable GPU ({str(error).strip() or type(error).__name__}); check "
            "`nvidia-smi` (driver for CUDA 13, or `pip install numba-cuda[cu12]` for 12), or --device cpu"
        ) from error


@cuda.jit
def _count_newlines(text, counts):
    """counts[b] += newlines in the text of block b: THREADS chunks of CHUNK_WORDS * 8 bytes. Reads each byte once."""
    begin = cuda.grid(1) * CHUNK_WORDS * 8
    found = 0
    for position in range(begin, min(begin + CHUNK_WORDS * 8, len(text))):
        found += rows.byte_at(text, position) == rows.NEWLINE
    if found:
        cuda.atomic.add(counts, cuda.blockIdx.x, found)


@cuda.jit
def _write_newlines(text, begins, ends):
    """ends[begins[b] + i] = position of newline i of block b's text, as in _count_newlines."""
    before = cuda.shared.array(THREADS, np.int32)
    thread = cuda.threadIdx.x
    begin = cuda.grid(1) * CHUNK_WORDS * 8
    end = min(begin + CHUNK_WORDS * 8, len(text))
    found = 0
    for position in range(begin, end):
        found += rows.byte_at(text, position) == rows.NEWLINE
    before[thread] = found
    cuda.syncthreads()
    # Sums of all threads up to this one, by doubling steps (Hillis, Steele 1986).
    step = 1
    while step < THREADS:
        more = 0
        if thread >= step:
            more = before[thread - step]
        cuda.syncthreads()
        before[thread] += more
        cuda.syncthreads()
        step *= 2
    place = begins[cuda.blockIdx.x] + before[thread] - found
    for position in range(begin, end):
        if rows.byte_at(text, position) == rows.NEWLINE:
            ends[place] = position
            place += 1


@cuda.jit
def _parse(text, ends, values, missing, faults):
    """One thread a row; rows.parse_row does the work. Moves about 250 B of text in and 172 B out a row."""
    row = cuda.grid(1)
    if row < len(ends):
        begin = 0
        if row > 0:
            begin = ends[row - 1] + 1
        faults[row] = rows.parse_row(text, begin, ends[row], row, values, missing)


def find_rows(text: np.ndarray) -> None:
    """Nothing: parse finds the rows, where the text already is. (Here as the CPU's twin runs in a reading thread.)"""


def _rows_on_device(text, length: int, last: int):
    """Row ends int64 [n] on the device, as cpu.find_rows gives them."""
    blocks = blocks_for(-(-length // (CHUNK_WORDS * 8)))
    counts = upload_array(np.zeros(blocks, np.int32))
    _count_newlines[blocks, THREADS](text, counts)
    found = download(counts).astype(np.int64)
    open_ended = last != rows.NEWLINE
    ends = cuda.device_array(int(found.sum()) + open_ended, np.int64)
    begins = upload_array(np.cumsum(found) - found)
    _write_newlines[blocks, THREADS](text, begins, ends)
    if open_ended:
        ends[len(ends) - 1 :].copy_to_device(np.array([length]))
    return ends


def parse(text: np.ndarray, ends: None, memory: Reused | None = None):
    """Parse a slab of text, uint8 [bytes] on the host. Returns values and missing on the device, faults on the host."""
    if not len(text):
        return *upload(np.empty((0, COLUMNS), np.uint32), np.empty(0, np.uint64)), np.empty(0, np.int32)
    budget.take("a slab's buffers", SLAB_FACTOR * len(text))
    on_device = upload_array(text)
    ends = _rows_on_device(on_device, len(text), int(text[-1]))
    values = cuda.device_array((len(ends), COLUMNS), np.uint32, order="F")
    missing, faults = cuda.device_array(len(ends), np.uint64), cuda.device_array(len(ends), np.int32)
    _parse[blocks_for(len(ends)), THREADS](on_device, ends, values, missing, faults)
    return values, missing, download(faults)


def set_memory_limit(limit: int) -> None:
    """Hold the device memory that the functions here take under so many bytes, 0: no limit."""
    budget.limit = limit


def peak_device_bytes() -> int:
    """The most device memory that was in use."""
    return budget.peak


def upload(values: np.ndarray, missing: np.ndarray):
    """Values and missing of a slab that another parser made, on the device."""
    return upload_array(np.asfortranarray(values)), upload_array(missing)


def labels(values) -> np.ndarray:
    """The labels of a parsed slab, uint32 [n], on the host."""
    return download(values[:, 0]) if len(values) else np.empty(0, np.uint32)


def smallest(values) -> int:
    """The smallest integer of a parsed slab, missing ones counting as 0; the slab has rows."""
    return min(int(download(values[:, c]).view(np.int32).min()) for c in range(FIRST_DENSE, FIRST_SPARSE))


@cuda.jit
def _keep(values, missing, kept, new_values, new_missing):
    i, column = cuda.grid(1), cuda.blockIdx.y
    if i < len(kept):
        new_values[i, column] = values[kept[i], column]
        if column == 0:
            new_missing[i] = missing[kept[i]]


def keep_rows(values, missing, keep: np.ndarray):
    """Values and missing of the rows where keep, bool [n] on the host, is true."""
    kept = np.flatnonzero(keep)
    new_values = cuda.device_array((len(kept), COLUMNS), np.uint32, order="F")
    new_missing = cuda.device_array(len(kept), np.uint64)
    if len(kept):
        _keep[(blocks_for(len(kept)), COLUMNS), THREADS](values, missing, upload_array(kept), new_values, new_missing)
    return new_values, new_missing


@cuda.jit
def _count_missing(missing, counts):
    """Block (b, c) counts column c over a part of the rows: one atomic a thread."""
    column, found = cuda.blockIdx.y, 0
    for row in range(cuda.grid(1), len(missing), cuda.gridDim.x * cuda.blockDim.x):
        found += rows.is_missing(missing[row], column)
    if found:
        cuda.atomic.add(counts, column, found)


def count_missing(missing) -> np.ndarray:
    """How many rows have each column empty: int64 [40] on the host."""
    counts = upload_array(np.zeros(COLUMNS, np.int32))
    if len(missing):
        _count_missing[(min(64, blocks_for(len(missing))), COLUMNS), THREADS](missing, counts)
    return download(counts).astype(np.int64)


@cuda.jit
def _integers(values, missing, shift, empty_value):
    row, column = cuda.grid(1), FIRST_DENSE + cuda.blockIdx.y
    if row < len(values):
        empty = rows.is_missing(missing[row], column)
        values[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)


def integers(values, missing, shift: int = 0, empty_value: int = 0) -> None:
    """Put what the record keeps in place of a slab's 13 integers; shift, empty_value: see rows.dense_value."""
    if len(values):
        grid = blocks_for(len(values)), FIRST_SPARSE - FIRST_DENSE
        _integers[grid, THREADS](values, missing, shift, empty_value)


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


def group(values, first_row: int, seed: int, buckets: int, memory: Reused) -> tuple[np.ndarray, np.ndarray]:
    """A coded slab's rows by bucket on the host: see shuffle.group; only the order within a bucket is another."""
    n = len(values)
    numbered = memory.empty((n,), NUMBERED)
    if not n:
        return numbered, np.zeros(buckets, np.int64)
    places, counts = cuda.device_array(n, np.int64), upload_array(np.zeros(buckets, np.int32))
    start = start_of_keys(np.uint64(seed % 2**64))
    _count_buckets[blocks_for(n), THREADS](start, first_row, buckets, places, counts)
    ends = np.cumsum(download(counts).astype(np.int64))
    begins = upload_array(np.concatenate([[0], ends[:-1]]))
    _take_places[blocks_for(n), THREADS](places, begins)
    words = cuda.device_array((n, NUMBER_WORDS + COLUMNS), np.uint32)
    _scatter[(blocks_for(n), NUMBER_WORDS + COLUMNS), THREADS](values, first_row, places, words)
    words.copy_to_host(numbered.view(np.uint32).reshape(n, -1))
    return numbered, ends


def rows_of(values, memory: Reused) -> np.ndarray:
    """A coded slab as rows int32 [n, 40], row-major, on the host; they lie in `memory`."""
    found = memory.empty(values.shape, RECORD_DTYPE)
    if len(values):
        columns = memory_of_columns(values)
        found[:] = columns.view(RECORD_DTYPE)
    return found


def memory_of_columns(values) -> np.ndarray:
    """values as they lie on the device, on the host: uint32 [n, 40], column-major."""
    host = np.empty(values.shape, np.uint32, order="F")
    values.copy_to_host(host)
    return host


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
    """Turns coded rows into records. ids: 26 arrays int32, the ids of a column by dictionary code."""

    def __init__(self, ids: tuple[np.ndarray, ...]):
        assert len(ids) == SPARSE
        budget.take("ids", sum(column.nbytes for column in ids))
        self._ids = upload_array(np.concatenate(ids))
        self._base = upload_array(np.cumsum([0] + [len(column) for column in ids[:-1]]))

    def take(self, coded: np.ndarray, shifts: np.ndarray) -> None:
        """See cpu.Finisher: the rows go to the device once for all calls of finish()."""
        self._coded, self._shifts = upload_array(np.ascontiguousarray(coded)), upload_array(shifts)

    def finish(self, order: np.ndarray, records: np.ndarray) -> None:
        """Write records int32 [m, 40] on the host: see cpu.Finisher."""
        if len(order):
            found = cuda.device_array(records.shape, RECORD_DTYPE)
            _finish[(math.ceil(len(order) / THREADS), COLUMNS), THREADS](
                self._coded, upload_array(order), self._shifts, self._ids, self._base, found
            )
            found.copy_to_host(records)
