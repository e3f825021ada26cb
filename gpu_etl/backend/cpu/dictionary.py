"""Dictionary coding on the CPU: category values become codes in the order in which they are met, and are counted.

A value that repeats costs one look-up in a table of its column, and every later pass reads a small, dense code in its
place: the codes of popular values are small, so what they index stays in the caches.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpu_etl.common.jit import compiled
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.vocabulary import ColumnCounts, Counts, fill
from gpu_etl.schema import FIRST_SPARSE, SPARSE, Preset

BLOCK = 256  # values whose look-ups are under way at once
FIRST_SLOTS = 1 << 10
NEVER = np.iinfo(np.int64).max


@compiled
def _count(codes, first_row, stats):
    for i in range(len(codes)):
        code = np.uint64(codes[i])
        stats[code, 0] += 1
        if first_row + i < stats[code, 1]:
            stats[code, 1] = first_row + i


@compiled
def _count_numbered(codes, row_numbers, stats):
    for i in range(len(codes)):
        _count(codes[i : i + 1], row_numbers[i], stats)


@compiled
def _code(values, missing, column, missing_is_zero, index_range, table, keys, stats, used, first_row, start):
    """Replace values[start:] (uint32 [n]) by their codes, in blocks; stops before one that might overfill the table.

    table int64 [slots] of (key, code); keys uint32 [codes]; stats int64 [codes, 2]: occurrences, first row; code 0 is
    that of missing values, 1 to used are taken. Returns (row, used): to go on from row after the table grew; (n, used)
    when done.
    """
    mask = len(table) - 1
    entries = np.empty(BLOCK, np.int64)
    for begin in range(start, len(values), BLOCK):
        end = min(begin + BLOCK, len(values))
        if 2 * (used + end - begin) > len(table):
            return begin, used
        # Loads that do not wait for one another, so that the cache misses of a block overlap.
        for row in range(begin, end):
            key = rows.category_key(np.int64(values[row]), index_range)
            entries[np.uint64(row - begin)] = table[np.uint64(rows.hash32(key) & mask)]
        for row in range(begin, end):
            # No branch on what is missing, which is random in many columns: its 0 was looked up too, for nothing.
            empty = rows.is_missing(missing[row], column) & (not missing_is_zero)
            key = rows.category_key(np.int64(values[row]), index_range)
            entry = entries[np.uint64(row - begin)]
            if ((rows.entry_key(entry) != key) | (entry == 0)) & (not empty):
                slot = np.uint64(rows.find_slot(table, 0, mask, key))
                entry = table[slot]
                if entry == 0:
                    used += 1
                    entry = rows.make_entry(key, used)
                    table[slot] = entry
                    keys[used] = key
            values[row] = 0 if empty else rows.entry_payload(entry)
        _count(values[begin:end], first_row + begin, stats)
    return len(values), used


class _Dictionary:
    """One column's dictionary."""

    def __init__(self, column: int, keys: np.ndarray):
        """keys uint32 [k]: those known already, in the order of their codes; not counted yet."""
        self.column, self.used, self.reported = column, len(keys), len(keys)
        slots = FIRST_SLOTS
        while slots < 4 * (len(keys) + BLOCK):
            slots *= 2
        self._make(slots, keys, np.empty((0, 2), np.int64))

    def _make(self, slots: int, keys: np.ndarray, stats: np.ndarray) -> None:
        self.table = np.zeros(slots, np.int64)
        self.keys = np.zeros(slots // 2 + 1, np.uint32)
        self.keys[1 : len(keys) + 1] = keys
        self.stats = np.zeros((slots // 2 + 1, 2), np.int64)
        self.stats[:, 1] = NEVER
        self.stats[: len(stats)] = stats
        fill(self.table, 0, slots - 1, keys, 1)

    def code(self, values: np.ndarray, missing: np.ndarray, first_row: int, preset: Preset) -> None:
        row = 0
        while row < len(values):
            row, self.used = _code(
                values, missing, self.column, preset.missing_is_zero, preset.max_index_range,
                self.table, self.keys, self.stats, self.used, first_row, row,
            )  # fmt: skip
            if row < len(values):
                keys, stats = self.keys[1 : self.used + 1], self.stats[: self.used + 1]
                self._make(2 * len(self.table), keys, stats)

    def new_keys(self) -> np.ndarray:
        begin, self.reported = self.reported, self.used
        return self.keys[begin + 1 : self.used + 1]


class Dictionaries:
    """Dictionaries of the 26 category columns, counting as they code.

    Memory: 36 to 72 B a distinct value. `workers` threads share the columns; close() ends them.
    """

    def __init__(self, preset: Preset, workers: int, keys: list[np.ndarray] | None = None):
        """keys: 26 arrays of new_keys(), joined, to go on where others stopped; their rows come through recount()."""
        keys = keys or [np.empty(0, np.uint32)] * SPARSE
        self._preset = preset
        self._columns = [_Dictionary(FIRST_SPARSE + c, known) for c, known in enumerate(keys)]
        self._pool = ThreadPoolExecutor(max(1, min(workers, SPARSE)))

    def code(self, values: np.ndarray, missing: np.ndarray, first_row: int) -> None:
        """Put codes in place of the category values of a slab, and count them.

        values uint32 [n, 40], column-major; missing uint64 [n]; first_row: number of its first row, the others follow.
        """
        list(self._pool.map(lambda d: d.code(values[:, d.column], missing, first_row, self._preset), self._columns))

    def recount(self, coded: np.ndarray, row_numbers: np.ndarray) -> None:
        """Count rows coded earlier: coded int32 [n, 40], their numbers int64 [n]."""
        list(self._pool.map(lambda d: _count_numbered(coded[:, d.column], row_numbers, d.stats), self._columns))

    def new_keys(self) -> Callable[[], list[np.ndarray]]:
        """What gives 26 arrays uint32: values met for the first time since the last call, in the order of their
        codes."""
        found = [column.new_keys() for column in self._columns]
        return lambda: found

    def counts(self) -> Counts:
        """What was counted so far; values in the order of their codes, from code 1 on."""
        slices = [(column, slice(1, column.used + 1)) for column in self._columns]
        return Counts(tuple(ColumnCounts(d.keys[s], d.stats[s, 0], d.stats[s, 1]) for d, s in slices))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all dictionaries take."""
        return sum(d.table.nbytes + d.keys.nbytes + d.stats.nbytes for d in self._columns)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
