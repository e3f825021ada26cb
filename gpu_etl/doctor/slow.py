"""The slab functions of cpu.py in slow, obvious Python over specification.py: what the CPU's are held against.

Values lie on the host, uint32 [n, 40]; see cpu.py for what each function does.
"""

import numpy as np

from gpu_etl import rows
from gpu_etl.doctor import specification
from gpu_etl.numbered import DAY_SHIFT, NUMBERED
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE, SPARSE
from gpu_etl.tally import Summary
from gpu_etl.vocabulary import ColumnCounts, Counts

KINDS = {
    specification.FIELDS: rows.FAULT_FIELDS, specification.LABEL: rows.FAULT_LABEL,
    specification.INTEGER: rows.FAULT_INTEGER, specification.RANGE: rows.FAULT_RANGE,
    specification.HEX: rows.FAULT_HEX,
}  # fmt: skip
MASK = 2**64 - 1


def set_threads(workers: int) -> int:
    return workers


def host_bytes(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def readers() -> dict:
    return {}


def find_rows(text: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(text == rows.NEWLINE)
    return np.append(ends, len(text)) if len(text) and text[-1] != rows.NEWLINE else ends


def parse(text: np.ndarray, ends: np.ndarray, memory=None):
    data, begin, n = text.tobytes(), 0, len(ends)
    values, missing, faults = np.zeros((n, COLUMNS), np.uint32), np.zeros(n, np.uint64), np.zeros(n, np.int32)
    for row, end in enumerate(ends.tolist()):
        found, fault = specification.parse_row(data[begin:end])
        if fault:
            faults[row] = KINDS[fault[0]] * rows.FAULT_STRIDE + fault[1]
        else:
            values[row] = [(value or 0) % 2**32 for value in found]
            missing[row] = sum(1 << c for c, value in enumerate(found) if value is None)
        begin = end + 1
    return values, missing, faults


def _empty(missing: np.ndarray) -> np.ndarray:
    """bool [n, 40] of the bits of missing."""
    return (missing[:, None] >> np.arange(COLUMNS, dtype=np.uint64) & np.uint64(1)).astype(bool)


def upload(values: np.ndarray, missing: np.ndarray):
    return values.copy(), missing.copy()


def labels(values: np.ndarray) -> np.ndarray:
    return values[:, 0]


def keep_rows(values: np.ndarray, missing: np.ndarray, keep: np.ndarray):
    return values[keep], missing[keep]


def rows_of(values: np.ndarray, memory):
    return lambda: values.astype(np.uint32).view(RECORD_DTYPE)


def summarize(values: np.ndarray, missing: np.ndarray) -> Summary:
    integers = values[:, FIRST_DENSE:FIRST_SPARSE].astype(np.int64)
    signed = np.where(integers >= 2**31, integers - 2**32, integers)
    smallest = int(signed.min()) if len(values) else rows.INT32_MAX
    return Summary(int(values[:, 0].sum()), _empty(missing).sum(0).tolist(), smallest)


def integers(values: np.ndarray, missing: np.ndarray, shift: int = 0, empty_value: int = 0) -> None:
    part = values[:, FIRST_DENSE:FIRST_SPARSE]
    signed = np.where(part.astype(np.int64) >= 2**31, part.astype(np.int64) - 2**32, part)
    kept = np.clip(signed + shift, 0, rows.INT32_MAX)
    part[:] = np.where(_empty(missing)[:, FIRST_DENSE:FIRST_SPARSE], empty_value, kept)


def _mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def _key(seed: int, row: int) -> int:
    golden = 0x9E3779B97F4A7C15
    start = _mix(_mix(seed) + golden & MASK)
    return _mix(start + golden * row & MASK)


def group(values: np.ndarray, first_row: int, seed: int, buckets: int, memory):
    numbers = first_row + np.arange(len(values))
    bucket = np.array([(_key(seed, int(row)) >> 32) * buckets >> 32 for row in numbers], np.int64)
    order = np.argsort(bucket, kind="stable")
    numbered = np.zeros(len(values), NUMBERED)
    numbered["row"], numbered["coded"] = numbers[order], rows_of(values, None)()[order]
    return lambda: (numbered, np.cumsum(np.bincount(bucket, minlength=buckets)))


class Finisher:
    def __init__(self, ids: tuple[np.ndarray, ...], shifts: np.ndarray):
        self._ids, self._day_shifts = ids, shifts

    def take(self, coded: np.ndarray, day: int):
        self._rows = coded[:, -COLUMNS:].astype(np.int64)
        self._shifts = np.full(len(coded), self._day_shifts[day])
        return lambda: None

    def take_shuffled(self, numbered: np.ndarray, seed: int):
        numbers = numbered["row"].tolist()
        order = sorted(range(len(numbers)), key=lambda i: _key(seed, numbers[i]))
        self._rows = numbered["coded"][order].astype(np.int64)
        self._shifts = np.array([self._day_shifts[numbers[i] >> DAY_SHIFT] for i in order], np.int64)
        return lambda: None

    def finish(self, begin: int, end: int, records: np.ndarray):
        part, shifts = self._rows[begin:end], self._shifts[begin:end, None]
        records[:, 0] = part[:, 0]
        moved = part[:, FIRST_DENSE:FIRST_SPARSE] + shifts
        records[:, FIRST_DENSE:FIRST_SPARSE] = np.clip(moved, 0, rows.INT32_MAX)
        for c in range(SPARSE):
            records[:, FIRST_SPARSE + c] = self._ids[c][part[:, FIRST_SPARSE + c]]
        return lambda: records


class Dictionaries:
    """A dict a column: value -> [code, count, first row]."""

    def __init__(self, preset, workers: int, keys: list[np.ndarray] | None = None):
        self._preset = preset
        self._columns: list[dict[int, list[int]]] = [
            {int(key): [code + 1, 0, 2**63 - 1] for code, key in enumerate(known)} for known in keys or [[]] * SPARSE
        ]
        self._reported = [len(column) for column in self._columns]

    def code(self, values: np.ndarray, missing: np.ndarray, first_row: int) -> None:
        empty = _empty(missing) & (not self._preset.missing_is_zero)
        for c, column in enumerate(self._columns, FIRST_SPARSE):
            for row, value in enumerate(values[:, c].tolist()):
                key = value % self._preset.max_index_range if self._preset.max_index_range else value
                if empty[row, c]:
                    values[row, c] = 0
                    continue
                entry = column.setdefault(key, [len(column) + 1, 0, first_row + row])
                entry[1], entry[2], values[row, c] = entry[1] + 1, min(entry[2], first_row + row), entry[0]

    def recount(self, coded: np.ndarray, row_numbers: np.ndarray) -> None:
        for c, column in enumerate(self._columns, FIRST_SPARSE):
            entries = list(column.values())
            for code, number in zip(coded[:, c].tolist(), row_numbers.tolist(), strict=True):
                if code:
                    entry = entries[code - 1]
                    entry[1], entry[2] = entry[1] + 1, min(entry[2], number)

    def new_keys(self):
        found = [np.array(list(col)[n:], np.uint32) for col, n in zip(self._columns, self._reported, strict=True)]
        self._reported = [len(column) for column in self._columns]
        return lambda: found

    def counts(self) -> Counts:
        columns = []
        for column in self._columns:
            stats = np.array([entry[1:] for entry in column.values()], np.int64).reshape(-1, 2)
            columns.append(ColumnCounts(np.array(list(column), np.uint32), stats[:, 0], stats[:, 1]))
        return Counts(tuple(columns))

    def close(self) -> None:
        pass
