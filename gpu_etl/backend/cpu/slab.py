"""The slab functions on the CPU, Numba loops around the functions of rows/scalar.py; cuda/slab.py has them on a GPU.

A slab goes through find_rows, parse, keep_rows, summarize, integers, Dictionaries.code (dictionary.py), and group or
rows_of; the encode pass through Finisher. encode does it all at once with a known vocabulary.
Every function works on one slab and computes with integers only, so that results do not depend on threads or slabs.
Parsed slabs are column-major: counting and coding go through them by columns.
"""

from collections.abc import Callable

import numba
import numpy as np

from gpu_etl.backend.cpu.dictionary import Dictionaries
from gpu_etl.common.buffers import ScratchBuffer, host_bytes
from gpu_etl.common.errors import DataError
from gpu_etl.common.jit import compiled, compiled_parallel
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.numbered import DAY_SHIFT, group as group_rows, words_of
from gpu_etl.rows.random_keys import keys_of
from gpu_etl.rows.statistics import Summary
from gpu_etl.rows.vocabulary import Lookup
from gpu_etl.schema import COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE, SPARSE, Preset

__all__ = [
    "Dictionaries", "Finisher", "encode", "enter_thread", "find_rows", "group", "host_bytes", "integers", "keep",
    "keep_rows", "labels", "parse", "peak_device_bytes", "readers", "rows_end", "rows_of", "set_memory_limit",
    "set_threads", "summarize", "synchronize", "upload",
]  # fmt: skip

SLAB_BYTES = 8 << 20  # of text: parsed, it stays in the L3 cache
ENCODE_ROWS = 1 << 15
BUCKET_BYTES = 8 << 20  # of the shuffle: rows to sort and finish lie in the L3 cache
CORES_PER_WRITER = 4  # several times as fast as the rest, too
CORES_PER_READER = 4  # a core inflates about four times as fast as it parses, codes and stores

SHORT_ROW = 128  # bytes; where rows are shorter on average, they are found in a second try
NEWLINES = np.uint64(0x0A0A0A0A0A0A0A0A)
EIGHT_ONES = np.uint64(0x0101010101010101)
EIGHT_HIGH_BITS = np.uint64(0x8080808080808080)
ENCODE_BLOCK = 512  # rows: 80 KB of values stay in the L2 cache while 26 columns are looked up


def set_threads(workers: int) -> int:
    """Use `workers` threads (0: all cores) in parallel loops; returns the number in use."""
    limit = numba.config.NUMBA_NUM_THREADS
    workers = min(workers or limit, limit)
    numba.set_num_threads(workers)
    return workers


def set_memory_limit(limit: int) -> None:
    """Raise DataError for a limit other than 0: it is for the memory of a GPU."""
    if limit:
        raise DataError(f"--memory-limit {limit}: only with --device cuda; the CPU's memory is bounded by --slab-bytes")


def enter_thread() -> None:
    """What every thread begins with that calls functions here or touches, frees or waits for their memory: nothing."""


def synchronize() -> None:
    """Wait for all that was started: nothing here."""


def readers() -> dict:
    """Ways of its own to read a kind of day file: none, extract.read_day has them."""
    return {}


def keep(rows: int) -> None:
    """Memory of a device for about so many coded rows between the passes: none, they are kept in files."""


def peak_device_bytes() -> int:
    """The most device memory that was in use: none."""
    return 0


@compiled
def _newlines(words, text, first, ends):
    """Write the positions of newlines in text into `ends`; returns how many there are, or any number above its length
    where it is too short.

    words: text from `first` on as little-endian uint64, as far as it fills them. A byte of a word is 0 after the XOR
    where it was a newline; see Warren, Hacker's Delight, 6-1, for the test that a word has such a byte.
    """
    found = _newlines_within(text, 0, first, ends, 0)
    for i in range(len(words)):
        word = words[i] ^ NEWLINES
        if (word - EIGHT_ONES) & ~word & EIGHT_HIGH_BITS:
            found = _newlines_within(text, first + 8 * i, first + 8 * i + 8, ends, found)
            if found > len(ends):
                return found
    return _newlines_within(text, first + 8 * len(words), len(text), ends, found)


@compiled
def _newlines_within(text, begin, end, ends, found):
    for position in range(begin, end):
        if text[position] == rows.NEWLINE:
            if found < len(ends):
                ends[found] = position
            found += 1
    return found


def find_rows(text: np.ndarray) -> np.ndarray:
    """Where the rows of a slab end: int64 [n], the position after each row's last byte. A last newline is optional.

    Where there are more than rows.most_rows(), only so many: see rows_end.
    """
    first = min(-text.ctypes.data % 8, len(text))  # words that are not aligned would be another type to Numba
    words = text[first : first + (len(text) - first) // 8 * 8].view(np.uint64)
    ends = np.empty(len(text) // SHORT_ROW + 1, np.int64)
    found = _newlines(words, text, first, ends)
    if found > len(ends):
        ends = np.empty(rows.most_rows(len(text)), np.int64)
        found = _newlines(words, text, first, ends)
    if found > len(ends):
        return ends
    if len(text) and text[-1] != rows.NEWLINE:
        return np.append(ends[:found], len(text))
    return ends[:found]


def rows_end(text: np.ndarray, ends: np.ndarray) -> int:
    """Bytes of a slab of text that hold the rows that parse() gives; behind them are rows for another slab."""
    return min(int(ends[-1]) + 1, len(text)) if len(ends) else 0


@compiled_parallel
def _parse(text, ends, values, missing, faults):
    for row in numba.prange(len(ends)):
        begin = 0 if row == 0 else ends[row - 1] + 1
        faults[row] = rows.parse_row(text, begin, ends[row], row, values, missing)


def parse(
    text: np.ndarray, ends: np.ndarray, memory: ScratchBuffer | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parse a slab. text uint8 [bytes], ends int64 [n] of find_rows.

    Returns values uint32 [n, 40] column-major, missing uint64 [n] (bit c = column c was empty), faults int32 [n] (0, or
    a code of rows.parse_row; the row's values are then undefined). The values lie in `memory`, where it is given.
    """
    values = (memory or ScratchBuffer()).empty((COLUMNS, len(ends)), np.uint32).T
    missing = np.empty(len(ends), np.uint64)
    faults = np.empty(len(ends), np.int32)
    _parse(text, ends, values, missing, faults)
    return values, missing, faults


def upload(values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and missing of a slab that another parser made, where the functions below find them: as they are."""
    return values, missing


def labels(values: np.ndarray) -> np.ndarray:
    """The labels of a parsed slab, uint32 [n]."""
    return values[:, 0]


def keep_rows(values: np.ndarray, missing: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and missing of the rows where keep, bool [n], is true."""
    return np.asfortranarray(values[keep]), missing[keep]


def rows_of(values: np.ndarray, memory: ScratchBuffer) -> Callable[[], np.ndarray]:
    """What gives a coded slab as rows int32 [n, 40], row-major, on the host; they lie in `memory`."""
    rows_ = memory.empty(values.shape, RECORD_DTYPE)
    rows_[:] = values.view(RECORD_DTYPE)
    return lambda: rows_


def group(
    values: np.ndarray, first_row: int, seed: int, buckets: int, memory: ScratchBuffer
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """What gives a coded slab's rows by bucket, on the host, as numbered.group does; they lie in `memory`."""
    found = group_rows(values, first_row, seed, buckets, memory)
    return lambda: found


@compiled
def _count_missing(missing, counts):
    for column in range(len(counts)):
        for row in range(len(missing)):
            counts[column] += rows.is_missing(missing[row], column)


def summarize(values: np.ndarray, missing: np.ndarray) -> Summary:
    """What there is in a parsed slab, values uint32 [n, 40] and missing uint64 [n]."""
    counts = np.zeros(COLUMNS, np.int64)
    _count_missing(missing, counts)
    smallest = values[:, FIRST_DENSE:FIRST_SPARSE].view(np.int32).min(initial=rows.INT32_MAX)
    return Summary(int(values[:, 0].sum()), counts.tolist(), int(smallest))


@compiled_parallel
def _integers(values, missing, shift, empty_value):
    for i in numba.prange(DENSE):
        column = FIRST_DENSE + i
        for row in range(len(values)):
            empty = rows.is_missing(missing[row], column)
            values[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)


def integers(values: np.ndarray, missing: np.ndarray, shift: int = 0, empty_value: int = 0) -> None:
    """Put what the record keeps in place of a slab's 13 integers (values uint32 [n, 40], missing uint64 [n]).

    shift, empty_value: see rows.dense_value.
    """
    _integers(values, missing, shift, empty_value)


@compiled_parallel
def _finish(coded, order, shifts, ids, base, records):
    for i in numba.prange(len(order)):
        row = np.uint64(order[i])
        records[i, 0] = coded[row, 0]
        for column in range(FIRST_DENSE, FIRST_SPARSE):
            records[i, column] = rows.dense_value(np.int64(coded[row, column]), False, shifts[row], 0)
        for c in range(SPARSE):
            column = FIRST_SPARSE + c
            records[i, column] = ids[np.uint64(base[c] + coded[row, column])]


class Finisher:
    """Turns coded rows into records. ids: 26 arrays int32, the ids of a column by dictionary code; shifts int64 [days]:
    what is added to the integers of each day."""

    def __init__(self, ids: tuple[np.ndarray, ...], shifts: np.ndarray):
        self._ids = np.concatenate(ids)
        self._base = np.cumsum([0] + [len(column) for column in ids[:-1]])
        self._day_shifts = shifts

    def take(self, coded: np.ndarray, day: int) -> Callable[[], None]:
        """Rows of a day for the next calls of finish(): int32 [n, 40 or more], contiguous, a coded row in the last 40
        of each. Returns what waits until, once all of these have returned, `coded` is no longer read: nothing here."""
        self._coded, self._order = coded[:, -COLUMNS:], np.arange(len(coded))
        self._shifts = np.full(len(coded), self._day_shifts[day])
        return lambda: None

    def take_shuffled(self, numbered: np.ndarray, seed: int) -> Callable[[], None]:
        """The same of rows NUMBERED [n] of any days, which come out in the order of their sort keys."""
        self._coded, self._order = words_of(numbered)[:, -COLUMNS:], np.argsort(keys_of(seed, numbered["row"]))
        self._shifts = self._day_shifts[numbered["row"] >> DAY_SHIFT]
        return lambda: None

    def finish(self, begin: int, end: int, records: np.ndarray) -> Callable[[], np.ndarray]:
        """What gives records begin to end, int32 [end - begin, 40]: `records`, on the host, which they fill."""
        _finish(self._coded, self._order[begin:end], self._shifts, self._ids, self._base, records)
        return lambda: records


@compiled_parallel
def _encode(values, missing, table, base, mask, missing_is_zero, index_range, rare_id, shift, empty_value, records):
    blocks = (len(values) + ENCODE_BLOCK - 1) // ENCODE_BLOCK
    for block in numba.prange(blocks):
        begin = block * ENCODE_BLOCK
        end = min(begin + ENCODE_BLOCK, len(values))
        for row in range(begin, end):
            records[row, 0] = values[row, 0]
            for column in range(FIRST_DENSE, FIRST_SPARSE):
                empty = rows.is_missing(missing[row], column)
                records[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)
        for c in range(SPARSE):
            column = FIRST_SPARSE + c
            for row in range(begin, end):
                value = np.int64(values[row, column])
                empty = rows.is_missing(missing[row], column)
                records[row, column] = rows.encode_category(
                    table, base[c], mask[c], value, empty, missing_is_zero, index_range, rare_id
                )


def encode(
    values: np.ndarray, missing: np.ndarray, lookup: Lookup, preset: Preset, shift: int = 0, empty_value: int = 0
) -> np.ndarray:
    """Records int32 [n, 40] of a parsed slab (values uint32 [n, 40], missing uint64 [n]), by a known vocabulary.

    shift, empty_value: of the integers, see schema.Preset and rows.dense_value.
    """
    records = np.empty(values.shape, RECORD_DTYPE)
    _encode(
        values, missing, lookup.table, lookup.base, lookup.mask,
        preset.missing_is_zero, preset.max_index_range, preset.rare_id, shift, empty_value, records,
    )  # fmt: skip
    return records
