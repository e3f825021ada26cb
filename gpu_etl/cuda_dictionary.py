"""Dictionary coding on a GPU: the same dictionaries as dictionary.py, in one hash table of the device.

Which code a value gets depends on the order in which threads arrive. Counts and first rows do not, and ids are given by
those, so the data set comes out the same.
"""

import numpy as np
from numba import cuda

from gpu_etl import rows
from gpu_etl.cuda_launch import blocks_for, budget, download, empty, launch, upload_array
from gpu_etl.schema import FIRST_SPARSE, SPARSE, Preset
from gpu_etl.vocabulary import ColumnCounts, Counts

FIRST_SLOTS = 1 << 10
PENDING = rows.INT32_MAX  # payload of a value that this slab brought, until it has its code
HOT = 1024  # codes counted in shared memory first: popular values are met early, so their codes are small
NEVER = np.iinfo(np.int64).max
SLOT_BYTES = 8 + (4 + 8 + 8) // 2  # a slot, and for every second one a key, a count and a first row
MAX_BLOCKS = 64  # a column; each goes through its share of the rows, so that its hot counts are added up once


@cuda.jit
def _insert(values, missing, missing_is_zero, index_range, table, base, mask, fresh, fresh_count):
    """Enter the values that are new, with payload PENDING; fresh[c, i]: their slots. Block (b, c): part of column c."""
    c = cuda.blockIdx.y
    for row in range(cuda.grid(1), len(values), cuda.gridDim.x * cuda.blockDim.x):
        if not missing_is_zero and rows.is_missing(missing[row], FIRST_SPARSE + c):
            continue
        key = rows.category_key(np.int64(values[row, FIRST_SPARSE + c]), index_range)
        slot = rows.hash32(key) & mask[c]
        while True:
            entry = np.int64(table[base[c] + slot])
            if entry == 0:
                entry = np.int64(cuda.atomic.cas(table, base[c] + slot, np.int64(0), rows.make_entry(key, PENDING)))
                if entry == 0:
                    fresh[c, cuda.atomic.add(fresh_count, c, 1)] = base[c] + slot
                    break
            if rows.entry_key(entry) == key:
                break
            slot = (slot + 1) & mask[c]


@cuda.jit
def _number(fresh, fresh_count, used, table, keys, key_base):
    """Give the new values of column c = block's y their codes, from used[c] + 1 on."""
    c = cuda.blockIdx.y
    for i in range(cuda.grid(1), fresh_count[c], cuda.gridDim.x * cuda.blockDim.x):
        slot = fresh[c, i]
        key = rows.entry_key(table[slot])
        code = used[c] + i + 1
        table[slot] = rows.make_entry(key, code)
        keys[key_base[c] + code] = key


@cuda.jit
def _code(values, missing, missing_is_zero, index_range, table, base, mask, counts, firsts, key_base, first_row):
    """Put codes in place of column c = block's y, count them, and note first rows. Hot codes are counted in shared
    memory, so that a column of three values does not put all its atomics on three addresses."""
    hot = cuda.shared.array(HOT, np.int32)
    c = cuda.blockIdx.y
    for i in range(cuda.threadIdx.x, HOT, cuda.blockDim.x):
        hot[i] = 0
    cuda.syncthreads()
    for row in range(cuda.grid(1), len(values), cuda.gridDim.x * cuda.blockDim.x):
        code = 0
        if missing_is_zero or not rows.is_missing(missing[row], FIRST_SPARSE + c):
            key = rows.category_key(np.int64(values[row, FIRST_SPARSE + c]), index_range)
            code = rows.entry_payload(table[rows.find_slot(table, base[c], mask[c], key)])
        values[row, FIRST_SPARSE + c] = code
        if first_row + row < firsts[key_base[c] + code]:
            cuda.atomic.min(firsts, key_base[c] + code, first_row + row)
        if code < HOT:
            cuda.atomic.add(hot, code, 1)
        else:
            cuda.atomic.add(counts, key_base[c] + code, np.uint64(1))
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, HOT, cuda.blockDim.x):
        if hot[i]:
            cuda.atomic.add(counts, key_base[c] + i, np.uint64(hot[i]))


@cuda.jit
def _recount(coded, row_numbers, counts, firsts, key_base):
    """Count rows coded earlier, column c = block's y."""
    row, c = cuda.grid(1), cuda.blockIdx.y
    if row < len(row_numbers):
        place = key_base[c] + coded[row, FIRST_SPARSE + c]
        cuda.atomic.add(counts, place, np.uint64(1))
        cuda.atomic.min(firsts, place, row_numbers[row])


@cuda.jit
def _collect(keys, first, ends, found):
    """found = keys from first[c] on of every column c = block's y, one column after the other; ends: where they end."""
    i, c = cuda.grid(1), cuda.blockIdx.y
    begin = np.int64(0)
    if c > 0:
        begin = ends[c - 1]
    if i < ends[c] - begin:
        found[begin + i] = keys[first[c] + i]


@cuda.jit
def _enter(keys, key_base, used, table, base, mask):
    """Enter codes 1 to used[c] of column c = block's y into an empty table."""
    c = cuda.blockIdx.y
    for code in range(1 + cuda.grid(1), used[c] + 1, cuda.gridDim.x * cuda.blockDim.x):
        key = np.int64(keys[key_base[c] + code])
        slot = rows.hash32(key) & mask[c]
        while np.int64(cuda.atomic.cas(table, base[c] + slot, np.int64(0), rows.make_entry(key, code))) != 0:
            slot = (slot + 1) & mask[c]


class Dictionaries:
    """See dictionary.Dictionaries; values and missing of a slab are on the device here. `workers` is not used."""

    def __init__(self, preset: Preset, workers: int, keys: list[np.ndarray] | None = None):
        keys = keys or [np.empty(0, np.uint32)] * SPARSE
        self._preset = preset
        self._used = np.array([len(column) for column in keys])
        self._reported = self._used.copy()
        self._slots = np.zeros(SPARSE, np.int64)
        self._make_room(0, keys)

    def _make_room(self, rows_: int, host_keys: list[np.ndarray] | None = None) -> None:
        """Grow what a slab of so many rows, all of new values, would fill to more than a half."""
        wanted = self._slots.copy()
        for c in range(SPARSE):
            wanted[c] = max(wanted[c], FIRST_SLOTS)
            while wanted[c] < 2 * (self._used[c] + rows_):
                wanted[c] *= 2
        if (wanted == self._slots).all():
            return
        budget.take("dictionaries", int(wanted.sum()) * SLOT_BYTES)
        if host_keys is None:
            host_keys, counts, firsts = self._download()
        else:
            counts, firsts = ([np.zeros(len(k) + 1, t) for k in host_keys] for t in (np.uint64, np.int64))
            for column in firsts:
                column[:] = NEVER
        self._slots = wanted
        self._base = upload_array(np.cumsum(wanted) - wanted)
        self._mask = upload_array(wanted - 1)
        room = wanted // 2 + 1
        self._begins = np.cumsum(room) - room
        self._key_base = upload_array(self._begins)
        self._keys = self._laid_out(host_keys, np.uint32, 1, 0)
        self._counts = self._laid_out(counts, np.uint64, 0, 0)
        self._firsts = self._laid_out(firsts, np.int64, 0, NEVER)
        self._table = upload_array(np.zeros(wanted.sum(), np.int64))
        grid, used = (blocks_for(int(self._used.max())), SPARSE), upload_array(self._used)
        launch(_enter, grid, self._keys, self._key_base, used, self._table, self._base, self._mask)

    def _laid_out(self, columns: list[np.ndarray], dtype, shift: int, empty: int):
        """The columns one after the other, each where its codes begin plus `shift`, on the device."""
        together = np.full((self._slots // 2 + 1).sum(), empty, dtype)
        for begin, column in zip(self._begins, columns, strict=True):
            together[begin + shift : begin + shift + len(column)] = column
        return upload_array(together)

    def _download(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Keys (from code 1 on), counts and first rows (from code 0 on) of each column."""
        keys, counts, firsts = (download(array) for array in (self._keys, self._counts, self._firsts))
        ends = self._begins + self._used + 1
        pairs = list(zip(self._begins, ends, strict=True))
        return (
            [keys[begin + 1 : end] for begin, end in pairs],
            [counts[begin:end] for begin, end in pairs],
            [firsts[begin:end] for begin, end in pairs],
        )

    def code(self, values, missing, first_row: int) -> None:
        """Put codes in place of the category values of a slab, and count them: see dictionary.Dictionaries."""
        n = len(values)
        if not n:
            return
        self._make_room(n)
        preset = self._preset
        rules = preset.missing_is_zero, preset.max_index_range
        grid = min(MAX_BLOCKS, blocks_for(n)), SPARSE
        fresh = empty((SPARSE, n), np.int64)
        fresh_count = upload_array(np.zeros(SPARSE, np.int32))
        table = self._table, self._base, self._mask
        launch(_insert, grid, values, missing, *rules, *table, fresh, fresh_count)
        used = upload_array(self._used)
        launch(_number, grid, fresh, fresh_count, used, self._table, self._keys, self._key_base)
        counted = self._counts, self._firsts, self._key_base
        launch(_code, grid, values, missing, *rules, *table, *counted, first_row)
        self._used = self._used + download(fresh_count)

    def recount(self, coded: np.ndarray, row_numbers: np.ndarray) -> None:
        """Count rows coded earlier: coded int32 [n, 40], their numbers int64 [n], both on the host."""
        if len(coded):
            grid = blocks_for(len(coded)), SPARSE
            numbers = upload_array(np.ascontiguousarray(row_numbers))
            coded = upload_array(np.ascontiguousarray(coded))
            launch(_recount, grid, coded, numbers, self._counts, self._firsts, self._key_base)

    def new_keys(self) -> list[np.ndarray]:
        """See dictionary.Dictionaries."""
        new = self._used - self._reported
        ends = np.cumsum(new)
        if not ends[-1]:
            return [np.empty(0, np.uint32)] * SPARSE
        found = empty(int(ends[-1]), np.uint32)
        first = upload_array(self._begins + self._reported + 1)
        launch(_collect, (blocks_for(int(new.max())), SPARSE), self._keys, first, upload_array(ends), found)
        self._reported = self._used.copy()
        return np.split(download(found), ends[:-1])

    def counts(self) -> Counts:
        """See dictionary.Dictionaries."""
        keys, counts, firsts = self._download()
        return Counts(tuple(
            ColumnCounts(k, c[1:].astype(np.int64), f[1:]) for k, c, f in zip(keys, counts, firsts, strict=True)
        ))  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that all dictionaries take."""
        arrays = self._table, self._keys, self._counts, self._firsts
        return sum(array.size * array.dtype.itemsize for array in arrays)

    def close(self) -> None:
        """Nothing to end: the device's memory goes with this object."""
