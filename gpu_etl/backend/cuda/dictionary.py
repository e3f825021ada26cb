"""Dictionary coding on a GPU: the same dictionaries as dictionary.py, in one hash table of the device.

Which code a value gets depends on the order in which threads arrive. Counts and first rows do not, and ids are given by
those, so the data set comes out the same.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda

from gpu_etl.backend.cuda.kernel import blocks_for, kernel
from gpu_etl.backend.cuda.launch import Input, Memory, download, launch, stream, synchronize
from gpu_etl.backend.cuda.new_keys import NewKeys
from gpu_etl.backend.cuda.parse import MISSING, VALUES, Rows
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.vocabulary import ColumnCounts, Counts
from gpu_etl.schema import COLUMNS, FIRST_SPARSE, SPARSE, Preset

FIRST_SLOTS = 1 << 10
PENDING = rows.INT32_MAX  # payload of a value that this slab brought, until it has its code
HOT = 1024  # codes counted in shared memory first: popular values are met early, so their codes are small
NEVER = np.iinfo(np.int64).max
MAX_BLOCKS = 64  # a column; each goes through its share of the rows, so that its hot counts are added up once
PLACES, COUNTS, KEYS = "int64[::1]", "uint64[::1]", "uint32[::1]"  # of each column or slot; counts; values


@kernel(VALUES, MISSING, "int64", "int64", "int64", PLACES, PLACES, PLACES, "uint32[::1]", "int32[::1]")
def _insert(values, missing, count, missing_is_zero, index_range, table, base, mask, fresh, fresh_count):
    """Enter the values that are new, with payload PENDING. fresh[c * count + i]: their slots, counted from base[c].
    Block (b, c): part of column c."""
    c = cuda.blockIdx.y
    for row in range(cuda.grid(1), count, cuda.gridDim.x * cuda.blockDim.x):
        if missing_is_zero == 0 and rows.is_missing(missing[row], FIRST_SPARSE + c):
            continue
        key = rows.category_key(np.int64(values[row, FIRST_SPARSE + c]), index_range)
        slot = rows.hash32(key) & mask[c]
        while True:
            entry = np.int64(table[base[c] + slot])
            if entry == 0:
                entry = np.int64(cuda.atomic.cas(table, base[c] + slot, np.int64(0), rows.make_entry(key, PENDING)))
                if entry == 0:
                    fresh[c * count + cuda.atomic.add(fresh_count, c, 1)] = slot
                    break
            if rows.entry_key(entry) == key:
                break
            slot = (slot + 1) & mask[c]


@kernel("uint32[::1]", "int32[::1]", "int64", PLACES, PLACES, PLACES, KEYS, PLACES, KEYS)
def _number(fresh, fresh_count, count, used, table, base, keys, key_base, new_keys):
    """Give the new values of column c = block's y their codes, from used[c] + 1 on, and put them into new_keys, column
    by column."""
    c = cuda.blockIdx.y
    before = np.int64(0)
    for column in range(c):
        before += fresh_count[column]
    for i in range(cuda.grid(1), fresh_count[c], cuda.gridDim.x * cuda.blockDim.x):
        slot = base[c] + fresh[c * count + i]
        key = rows.entry_key(table[slot])
        code = used[c] + i + 1
        table[slot] = rows.make_entry(key, code)
        keys[key_base[c] + code] = key
        new_keys[before + i] = key


@kernel("int32[::1]", PLACES)
def _advance(fresh_count, used):
    """used[c] += fresh_count[c], once all of them have their codes. One block."""
    for c in range(cuda.threadIdx.x, SPARSE, cuda.blockDim.x):
        used[c] += fresh_count[c]


@kernel(VALUES, MISSING, "int64", "int64", "int64", PLACES, PLACES, PLACES, COUNTS, PLACES, PLACES, "int64")
def _code(values, missing, count, missing_is_zero, index_range, table, base, mask, counts, firsts, key_base, first_row):
    """Put codes in place of column c = block's y, count them, and note first rows. Hot codes are counted in shared
    memory, so that a column of three values does not put all its atomics on three addresses."""
    hot = cuda.shared.array(HOT, np.int32)
    c = cuda.blockIdx.y
    for i in range(cuda.threadIdx.x, HOT, cuda.blockDim.x):
        hot[i] = 0
    cuda.syncthreads()
    for row in range(cuda.grid(1), count, cuda.gridDim.x * cuda.blockDim.x):
        code = 0
        if missing_is_zero != 0 or not rows.is_missing(missing[row], FIRST_SPARSE + c):
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


@kernel("int32[::1]", PLACES, "int64", COUNTS, PLACES, PLACES)
def _recount(coded, row_numbers, count, counts, firsts, key_base):
    """Count rows coded earlier, column c = block's y."""
    row, c = cuda.grid(1), cuda.blockIdx.y
    if row < count:
        place = key_base[c] + coded[row * COLUMNS + FIRST_SPARSE + c]
        cuda.atomic.add(counts, place, np.uint64(1))
        cuda.atomic.min(firsts, place, row_numbers[row])


@kernel(KEYS, COUNTS, PLACES, PLACES, PLACES, KEYS, COUNTS, PLACES, PLACES, PLACES)
def _move(old_keys, old_counts, old_firsts, old_base, used, keys, counts, firsts, key_base, room):
    """Codes 0 to used[c] of column c = block's y move to where the column has more room, with nothing behind them."""
    c = cuda.blockIdx.y
    for code in range(cuda.grid(1), room[c], cuda.gridDim.x * cuda.blockDim.x):
        to, there = key_base[c] + code, old_base[c] + code
        if code <= used[c]:
            keys[to], counts[to], firsts[to] = old_keys[there], old_counts[there], old_firsts[there]
        else:
            keys[to], counts[to], firsts[to] = 0, 0, NEVER


@kernel(PLACES, "int64")
def _clear(table, slots):
    """table[:slots] = 0"""
    for slot in range(cuda.grid(1), slots, cuda.gridDim.x * cuda.blockDim.x):
        table[slot] = 0


@kernel(KEYS, PLACES, PLACES, PLACES, PLACES, PLACES)
def _enter(keys, key_base, used, table, base, mask):
    """Enter codes 1 to used[c] of column c = block's y into an empty table."""
    c = cuda.blockIdx.y
    for code in range(1 + cuda.grid(1), used[c] + 1, cuda.gridDim.x * cuda.blockDim.x):
        key = np.int64(keys[key_base[c] + code])
        slot = rows.hash32(key) & mask[c]
        while np.int64(cuda.atomic.cas(table, base[c] + slot, np.int64(0), rows.make_entry(key, code))) != 0:
            slot = (slot + 1) & mask[c]


class _Store:
    """Keys, counts and first rows of all columns by code, each column's where its codes begin; the hash table of their
    slots. slots int64 [26], powers of two: a column has room for half as many codes, and code 0."""

    def __init__(self, slots: np.ndarray):
        room = slots // 2 + 1
        self.slots, self.begins, together = slots, np.cumsum(room) - room, int(room.sum())
        self._memories = {
            name: Memory("dictionaries", dtype)
            for name, dtype in (("keys", np.uint32), ("counts", np.uint64), ("firsts", np.int64), ("table", np.int64))
        }
        self.keys, self.counts, self.firsts = (self._memories[name].take(together) for name in list(self._memories)[:3])
        self.table = self._memories["table"].take(int(slots.sum()))
        columns = {"base": np.cumsum(slots) - slots, "mask": slots - 1, "key_base": self.begins, "room": room}
        self._inputs = {name: Input("dictionaries", np.int64) for name in columns}
        self.base, self.mask, self.key_base, self.room = (self._inputs[n].put(a) for n, a in columns.items())

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        arrays = self.table, self.keys, self.counts, self.firsts
        return sum(array.size * array.dtype.itemsize for array in arrays)

    def release(self) -> None:
        """Give the memory back. Nothing that uses it may be under way."""
        for memory in (*self._memories.values(), *self._inputs.values()):
            memory.release()


class Dictionaries:
    """See dictionary.Dictionaries; values and missing of a slab are on the device here. `workers` is not used."""

    def __init__(self, preset: Preset, workers: int, keys: list[np.ndarray] | None = None):
        keys = keys or [np.empty(0, np.uint32)] * SPARSE
        self._preset = preset
        self._used = np.array([len(column) for column in keys])
        self._used_input, self._none = Input("dictionaries", np.int64), Input("dictionaries", np.int64)
        self._used_there = self._used_input.put(self._used)
        self._fresh = Memory("slab", np.uint32)
        self._recounted = Input("slab", np.int32), Input("slab", np.int64)
        self._new, self._unreported, self._reported = NewKeys(), 0, self._used.copy()
        self._store: _Store | None = None
        self._make_room(0)
        for begin, known in zip(self._store.begins, keys, strict=True):
            if len(known):
                self._store.keys[begin + 1 : begin + 1 + len(known)].copy_to_device(known, stream=stream("compute"))
        self._enter()

    def _make_room(self, count: int) -> None:
        """Grow what `count` rows, all of new values, would fill to more than a half. Both old and new are there then
        for a moment."""
        old = self._store
        wanted = np.full(SPARSE, FIRST_SLOTS) if old is None else old.slots.copy()
        while (short := wanted < 2 * (self._used + count)).any():
            wanted[short] *= 2
        if old is not None and (wanted == old.slots).all():
            return
        self._store = new = _Store(wanted)
        known, there = (old, self._used_there) if old else (new, self._none.put(np.full(SPARSE, -1)))
        grid = min(MAX_BLOCKS, blocks_for(int(wanted.max()) // 2 + 1)), SPARSE
        before = known.keys, known.counts, known.firsts, known.key_base
        launch(_move, grid, *before, there, new.keys, new.counts, new.firsts, new.key_base, new.room)
        if old is not None:
            self._enter()
            synchronize()
            old.release()

    def _enter(self) -> None:
        """Make the hash table from the keys."""
        store, slots = self._store, int(self._store.slots.sum())
        launch(_clear, min(SPARSE * MAX_BLOCKS, blocks_for(slots)), store.table, slots)
        grid = min(MAX_BLOCKS, blocks_for(int(self._used.max()))), SPARSE
        launch(_enter, grid, store.keys, store.key_base, self._used_there, store.table, store.base, store.mask)

    def _settle(self) -> None:
        """Take in how many values the last slab brought. By now, the host has waited for something that came later."""
        batch, self._new.started = self._new.started, None
        if batch is not None:
            self._used = self._used + batch.settle()
            self._reported = self._used if batch.asked else self._reported

    def code(self, values: Rows, missing, first_row: int) -> None:
        """Put codes in place of the category values of a slab, and count them: see dictionary.Dictionaries."""
        count = len(values)
        if not count:
            return
        self._settle()
        self._make_room(count)
        store, preset = self._store, self._preset
        most = SPARSE * values.values.shape[0]
        fresh = self._fresh.take(most)
        self._new.begin(most)
        rows_ = values.values, missing, count, int(preset.missing_is_zero), preset.max_index_range
        table, grid = (store.table, store.base, store.mask), (min(MAX_BLOCKS, blocks_for(count)), SPARSE)
        launch(_insert, grid, *rows_, *table, fresh, self._new.count)
        numbered = self._used_there, store.table, store.base, store.keys, store.key_base, self._new.device.array
        launch(_number, grid, fresh, self._new.count, count, *numbered)
        launch(_advance, 1, self._new.count, self._used_there)
        self._new.start()
        self._unreported += 1
        launch(_code, grid, *rows_, *table, store.counts, store.firsts, store.key_base, first_row)

    def recount(self, coded: np.ndarray, row_numbers: np.ndarray) -> None:
        """Count rows coded earlier: coded int32 [n, 40], their numbers int64 [n], both on the host."""
        if count := len(coded):
            store, grid = self._store, (blocks_for(count), SPARSE)
            flat, numbers = self._recounted[0].put(coded.ravel()), self._recounted[1].put(row_numbers)
            launch(_recount, grid, flat, numbers, count, store.counts, store.firsts, store.key_base)

    def new_keys(self) -> Callable[[], list[np.ndarray]]:
        """See dictionary.Dictionaries. Quick where it is called after each slab: then they come while the next one is
        computed on."""
        batch, slabs, self._unreported = self._new.started, self._unreported, 0
        if slabs == 1 and batch is not None:
            batch.asked = True
            return batch.keys
        self._settle()
        begins, keys = self._store.begins + 1, self._store.keys
        spans = list(zip(begins + self._reported, begins + self._used, strict=True)) if slabs else [(0, 0)] * SPARSE
        self._reported = self._used.copy()
        found = [download(keys[begin:end]) if begin < end else np.empty(0, np.uint32) for begin, end in spans]
        return lambda: found

    def counts(self) -> Counts:
        """See dictionary.Dictionaries."""
        self._settle()
        store = self._store
        keys, counts, firsts = (download(array) for array in (store.keys, store.counts, store.firsts))
        columns = zip(store.begins, self._used, strict=True)
        slices = [slice(begin + 1, begin + used + 1) for begin, used in columns]
        return Counts(tuple(ColumnCounts(keys[s], counts[s].astype(np.int64), firsts[s]) for s in slices))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that all dictionaries take."""
        return self._store.nbytes

    def close(self) -> None:
        """Give back the device's memory but for the counts, which are still to be asked for."""
        synchronize()
        self._fresh.release()
