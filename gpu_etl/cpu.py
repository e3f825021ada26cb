"""The slab functions on the CPU: find_rows, parse, Counter, encode. Numba loops around the scalar functions of rows.py.

Every function works on one slab and computes with integers only, so that results do not depend on threads or slabs.
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from gpu_etl import rows
from gpu_etl.jit import compiled, compiled_parallel
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE, SPARSE, Preset
from gpu_etl.vocabulary import ColumnCounts, Counts, Lookup

SCAN_BLOCK = 64
COUNT_BLOCK = 512  # rows: 80 KB of values stay in the L2 cache while 26 columns are counted
FIRST_CAPACITY = 1024


def set_threads(workers: int) -> int:
    """Use `workers` threads (0: all cores) in parallel loops; returns the number in use."""
    limit = numba.config.NUMBA_NUM_THREADS
    workers = min(workers or limit, limit)
    numba.set_num_threads(workers)
    return workers


@compiled
def _newlines(text, ends):
    """Write the positions of newlines in text into `ends`; returns how many there are."""
    found = 0
    whole = len(text) // SCAN_BLOCK * SCAN_BLOCK
    for block in range(0, whole, SCAN_BLOCK):
        hit = 0
        for position in range(block, block + SCAN_BLOCK):
            hit |= text[position] == rows.NEWLINE
        if hit:
            for position in range(block, block + SCAN_BLOCK):
                if text[position] == rows.NEWLINE:
                    ends[found] = position
                    found += 1
    for position in range(whole, len(text)):
        if text[position] == rows.NEWLINE:
            ends[found] = position
            found += 1
    return found


@compiled
def _count_newlines(text):
    found = 0
    for position in range(len(text)):
        found += text[position] == rows.NEWLINE
    return found


def find_rows(text: np.ndarray) -> np.ndarray:
    """Where the rows of a slab end: int64 [n], the position after each row's last byte. A last newline is optional."""
    open_ended = len(text) > 0 and text[-1] != rows.NEWLINE
    ends = np.empty(_count_newlines(text) + open_ended, np.int64)
    found = _newlines(text, ends)
    if open_ended:
        ends[found] = len(text)
    return ends


@compiled_parallel
def _parse(text, ends, values, missing, faults):
    for row in numba.prange(len(ends)):
        begin = 0 if row == 0 else ends[row - 1] + 1
        faults[row] = rows.parse_row(text, begin, ends[row], row, values, missing)


def parse(text: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parse a slab. text uint8 [bytes], ends int64 [n] of find_rows.

    Returns values uint32 [n, 40], missing uint64 [n] (bit c = column c was empty), faults int32 [n] (0, or a code of
    rows.parse_row; the row's values are then undefined).
    """
    values = np.empty((len(ends), COLUMNS), np.uint32)
    missing = np.empty(len(ends), np.uint64)
    faults = np.empty(len(ends), np.int32)
    _parse(text, ends, values, missing, faults)
    return values, missing, faults


@compiled
def _count_columns(tables, firsts, used, columns, values, missing, first_row, start, missing_is_zero, index_range):
    """Count the given columns of values[start:] in blocks; stops early, before a block that might overfill a table.

    tables: 26 arrays int64 [slots, 2] of (key, count); firsts: 26 arrays int64 [slots]; used int64 [26]: keys in each.
    Returns (row, i): columns[i] has to grow before the block at `row`; (n, 0) when done.
    """
    for begin in range(start, len(values), COUNT_BLOCK):
        end = min(begin + COUNT_BLOCK, len(values))
        for i in range(len(columns)):
            if 2 * (used[columns[i]] + end - begin) > len(firsts[columns[i]]):
                return begin, i
        for c in columns:
            table = tables[c]
            first = firsts[c]
            mask = len(first) - 1
            for row in range(begin, end):
                if not missing_is_zero and rows.is_missing(missing[row], FIRST_SPARSE + c):
                    continue
                key = rows.category_key(np.int64(values[row, FIRST_SPARSE + c]), index_range)
                slot = rows.find_slot(table, 0, mask, key)
                if table[slot, 1] == 0:
                    table[slot, 0] = key
                    first[slot] = first_row + row
                    used[c] += 1
                table[slot, 1] += 1
    return len(values), 0


@compiled
def _rehash(table, first, new_table, new_first):
    mask = len(new_first) - 1
    for slot in range(len(first)):
        if table[slot, 1] != 0:
            target = rows.find_slot(new_table, 0, mask, table[slot, 0])
            new_table[target] = table[slot]
            new_first[target] = first[slot]


class Counter:
    """Counts category values: per column, how often each occurs and in which row first. Slabs must come in file order.

    Memory: 24 B a slot, two to four slots a distinct value.
    """

    def __init__(self, preset: Preset, workers: int):
        self._preset = preset
        self._tables = [np.zeros((FIRST_CAPACITY, 2), np.int64) for _ in range(SPARSE)]
        self._firsts = [np.zeros(FIRST_CAPACITY, np.int64) for _ in range(SPARSE)]
        self._used = np.zeros(SPARSE, np.int64)
        workers = max(1, min(workers, SPARSE))
        self._groups = [np.arange(w, SPARSE, workers) for w in range(workers)]
        self._pool = ThreadPoolExecutor(workers)

    def add(self, values: np.ndarray, missing: np.ndarray, first_row: int) -> None:
        """Count a slab: values uint32 [n, 40], missing uint64 [n]; first_row is its first row's place in all input."""
        list(self._pool.map(lambda columns: self._add_columns(columns, values, missing, first_row), self._groups))

    def _add_columns(self, columns, values, missing, first_row):
        row, i = 0, 0
        while True:
            row, i = _count_columns(
                tuple(self._tables), tuple(self._firsts), self._used, columns, values, missing, first_row, row,
                self._preset.missing_is_zero, self._preset.max_index_range,
            )  # fmt: skip
            if row == len(values):
                return
            self._grow(columns[i])

    def _grow(self, c):
        capacity = 4 * max(len(self._firsts[c]), COUNT_BLOCK)
        table, first = np.zeros((capacity, 2), np.int64), np.zeros(capacity, np.int64)
        _rehash(self._tables[c], self._firsts[c], table, first)
        self._tables[c], self._firsts[c] = table, first

    def result(self) -> Counts:
        """What was counted so far."""
        columns = []
        for table, first in zip(self._tables, self._firsts, strict=True):
            full = table[:, 1] != 0
            columns.append(ColumnCounts(table[full, 0].astype(np.uint32), table[full, 1], first[full]))
        return Counts(tuple(columns))


@compiled_parallel
def _encode(values, missing, table, base, mask, missing_is_zero, index_range, rare_id, shift, empty_value, records):
    blocks = (len(values) + COUNT_BLOCK - 1) // COUNT_BLOCK
    for block in numba.prange(blocks):
        begin = block * COUNT_BLOCK
        end = min(begin + COUNT_BLOCK, len(values))
        for row in range(begin, end):
            records[row, 0] = values[row, 0]
            for column in range(FIRST_DENSE, FIRST_SPARSE):
                empty = rows.is_missing(missing[row], column)
                records[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)
        for c in range(base.size):
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
    """Records int32 [n, 40] of a parsed slab (values uint32 [n, 40], missing uint64 [n]).

    shift, empty_value: of the integers, see schema.Preset and rows.dense_value.
    """
    records = np.empty(values.shape, np.int32)
    _encode(
        values, missing, lookup.table, lookup.base, lookup.mask,
        preset.missing_is_zero, preset.max_index_range, preset.rare_id, shift, empty_value, records,
    )  # fmt: skip
    return records
