"""Coded rows on a GPU: into shuffle buckets, and from there into records."""

from collections.abc import Callable

import numpy as np
from numba import cuda

from gpu_etl.backend.cuda.kernel import blocks_for, kernel
from gpu_etl.backend.cuda.launch import Input, Mark, Memory, fetch, launch, sorted_places, stream
from gpu_etl.backend.cuda.new_keys import zero
from gpu_etl.backend.cuda.parse import VALUES, Rows, scan
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.numbered import DAY_SHIFT, NUMBER_WORDS, NUMBERED
from gpu_etl.rows.random_keys import bucket_of, key_of, start_of_keys
from gpu_etl.schema import COLUMNS, FIRST_SPARSE, RECORD_DTYPE, SPARSE

WORDS = NUMBER_WORDS + COLUMNS  # of a numbered row
TILE = 32  # rows that a block turns from columns into rows at a time
DAY_OF_HIGH_WORD = DAY_SHIFT - 32
NOWHERE = Memory("rows to encode", np.int64)  # in place of an order of rows
_no_places = Memory("slab", np.int32)
WORDS_, PLACES = "uint32[:, ::1]", "int64[::1]"


@kernel("uint64", "int64", "int64", "int64", "int32[::1]", "int32[::1]")
def _count_buckets(start, first_row, count, buckets, places, counts):
    """counts[b] = rows of bucket b; places[row] = its bucket."""
    row = cuda.grid(1)
    if row < count:
        bucket = bucket_of(key_of(start, first_row + row), buckets)
        places[row] = bucket
        cuda.atomic.add(counts, bucket, 1)


@kernel("int32[::1]", "int32[::1]", "int64")
def _take_places(places, begins, count):
    """places[row]: its bucket -> a place of its own in that bucket, whose begin moves to its end. Rows of a bucket may
    come in any order."""
    row = cuda.grid(1)
    if row < count:
        places[row] = cuda.atomic.add(begins, places[row], 1)


@kernel(VALUES, "int64", "int64", "int32[::1]", "int64", WORDS_, "int64")
def _to_rows(values, count, first_row, places, in_places, words, place):
    """words[place + i]: row i of values behind its number first_row + i, low half first; at words[place + places[i]]
    where in_places is 1. Block b turns rows TILE b on in shared memory, so that both sides are touched in runs."""
    tile = cuda.shared.array((TILE, WORDS), np.uint32)
    begin = cuda.blockIdx.x * TILE
    here = min(TILE, count - begin)
    for i in range(cuda.threadIdx.x, TILE * COLUMNS, cuda.blockDim.x):
        row, column = i % TILE, i // TILE
        if row < here:
            tile[row, NUMBER_WORDS + column] = values[begin + row, column]
    for row in range(cuda.threadIdx.x, here, cuda.blockDim.x):
        number = first_row + begin + row
        tile[row, 0] = number & rows.UINT32_MASK
        tile[row, 1] = number >> 32
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, here * WORDS, cuda.blockDim.x):
        row, word = i // WORDS, i % WORDS
        to = begin + row
        if in_places:
            to = np.int64(places[begin + row])
        words[place + to, word] = tile[row, word]


def number_rows(values: Rows, first_row: int, words, place: int, places=None) -> None:
    """words[place:] = the coded rows of a slab, numbered from first_row on; places: int32 [n], where each goes among
    them, None for their order."""
    blocks, given = max(1, -(-len(values) // TILE)), places is not None
    places = places if given else _no_places.take(1)
    launch(_to_rows, blocks, values.values, len(values), first_row, places, int(given), words, place)


class _Grouper:
    """What group() and rows_of() work in: made once a process."""

    def __init__(self):
        self._places, self._counts = Memory("slab", np.int32), Memory("slab", np.int32)
        self._total, self._words = Memory("slab", np.int64), Memory("coded rows", np.uint32, WORDS)
        self._copied = [Mark(), Mark()]

    def number(self, values: Rows, first_row: int, seed: int = 0, buckets: int = 0):
        """The numbered rows of a slab on the device, uint32 [n, 42], by bucket where there are any."""
        count, room = len(values), values.values.shape[0]
        self._copied[0].hold("compute")
        words, places = self._words.take(room), None
        if buckets:
            places = self._places.take(room)
            counts, total = self._counts.take(buckets), self._total.take(1)
            launch(zero, blocks_for(buckets), counts, buckets)
            start = int(start_of_keys(np.uint64(seed % 2**64)))
            launch(_count_buckets, blocks_for(count), start, first_row, count, buckets, places, counts)
            launch(scan, 1, counts, buckets, 0, total)
            launch(_take_places, blocks_for(count), places, counts, count)
        number_rows(values, first_row, words, 0, places)
        return words[:count]

    def fetch(self, words, host: np.ndarray, ends: np.ndarray) -> Callable[[], None]:
        """Start to bring them to the host, and where the buckets end, int32 [buckets]; returns what waits for it."""
        self._copied.reverse()
        wait = fetch(words, host, self._copied[0])
        if len(ends):
            self._counts.array[: len(ends)].copy_to_host(ends, stream=stream("down"))
            self._copied[0].put("down")
        return wait


_grouper = _Grouper()


def words_of(numbered: np.ndarray) -> np.ndarray:
    """Rows NUMBERED [n] as uint32 [n, 42]."""
    return numbered.view(np.uint32).reshape(len(numbered), WORDS)


def group(
    values: Rows, first_row: int, seed: int, buckets: int, memory: ScratchBuffer
) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Brings a coded slab's rows by bucket to the host: see cpu.group; only the order within a bucket is another."""
    count, end_bytes = len(values), -(-buckets * 4 // NUMBERED.itemsize) * NUMBERED.itemsize
    together = memory.empty((count + end_bytes // NUMBERED.itemsize,), NUMBERED)
    numbered, ends = together[:count], together[count:].view(np.int32)[:buckets]
    if not count:
        return lambda: (numbered, np.zeros(buckets, np.int64))
    wait = _grouper.fetch(_grouper.number(values, first_row, seed, buckets), words_of(numbered), ends)

    def arrived() -> tuple[np.ndarray, np.ndarray]:
        wait()
        return numbered, ends.astype(np.int64)

    return arrived


def rows_of(values: Rows, memory: ScratchBuffer) -> Callable[[], np.ndarray]:
    """Brings a coded slab to the host as rows: see cpu.rows_of."""
    words = words_of(memory.empty((len(values),), NUMBERED))
    nothing = np.empty(0, np.int32)
    wait = _grouper.fetch(_grouper.number(values, 0), words, nothing) if len(values) else None

    def arrived() -> np.ndarray:
        if wait is not None:
            wait()
        return np.ascontiguousarray(words[:, NUMBER_WORDS:].view(RECORD_DTYPE))

    return arrived


@kernel("uint64", WORDS_, "int64", "int64", "uint64[::1]", "int64")
def _keys(start, words, begin, count, keys, place):
    """keys[place + i] = sort key of the numbered row begin + i."""
    i = cuda.grid(1)
    if i < count:
        number = np.int64(words[begin + i, 1]) << 32 | np.int64(words[begin + i, 0])
        keys[place + i] = key_of(start, number)


@kernel(WORDS_, "int64", PLACES, "int64", "int64", "int64", "int64", PLACES, "int32[::1]", PLACES, "int32[:, ::1]")
def _finish(words, first, order, in_order, begin, count, day, shifts, ids, base, records):
    """records[i] = row order[begin + i] of words, or row first + begin + i where they stay in_order; the last 40 words
    of a row are a coded one. shifts: of its day, or of that in its number where day is -1. A thread a value:
    neighbours read and write neighbours."""
    thread = cuda.grid(1)
    i, column = thread // COLUMNS, thread % COLUMNS
    if i < count:
        row = first + begin + i
        if in_order == 0:
            row = order[begin + i]
        value = np.int64(np.int32(words[row, words.shape[1] - COLUMNS + column]))
        if column >= FIRST_SPARSE:
            records[i, column] = ids[base[column - FIRST_SPARSE] + value]
        elif column > 0:
            of = day
            if day < 0:
                of = np.int64(words[row, 1]) >> DAY_OF_HIGH_WORD
            records[i, column] = rows.dense_value(value & rows.UINT32_MASK, False, shifts[of], 0)
        else:
            records[i, column] = value


def keys_there(words, ranges: list[tuple[int, int]], seed: int):
    """Sort keys uint64 of the rows of some ranges of numbered rows on the device, one range after the other."""
    keys = _room.keys.take(sum(end - begin for begin, end in ranges))
    start, place = int(start_of_keys(np.uint64(seed % 2**64))), 0
    for begin, end in ranges:
        launch(_keys, blocks_for(end - begin), start, words, begin, end - begin, keys, place)
        place += end - begin
    return keys


class _Room:
    """What finishers work in, one after the other: made once a process."""

    def __init__(self):
        name = "rows to encode"
        self.rows = {width: [Memory(name, np.uint32, width) for _ in range(2)] for width in (COLUMNS, WORDS)}
        self.arrived = {width: [Mark(), Mark()] for width in (COLUMNS, WORDS)}
        self.used, self.keys = Mark(), Memory(name, np.uint64)
        self.records, self.copied = [Memory("records", RECORD_DTYPE, COLUMNS) for _ in range(2)], [Mark(), Mark()]


_room = _Room()


class Finisher:
    """See cpu.Finisher; ids lie on the device, and the rows taken, of one finisher at a time."""

    def __init__(self, ids: tuple[np.ndarray, ...], shifts: np.ndarray):
        assert len(ids) == SPARSE
        self._ids, self._base, self._shifts = Input("ids", np.int32), Input("ids", np.int64), Input("ids", np.int64)
        self._fixed = (
            self._shifts.put(shifts), self._ids.put(np.concatenate(ids)),
            self._base.put(np.cumsum([0] + [len(column) for column in ids[:-1]])),
        )  # fmt: skip

    def take(self, coded: np.ndarray, day: int) -> Callable[[], None]:
        """See cpu.Finisher."""
        wait = self._upload(coded)
        self._first, self._day, self._order = 0, day, None
        return wait

    def take_shuffled(self, numbered: np.ndarray, seed: int) -> Callable[[], None]:
        """See cpu.Finisher."""
        wait, count = self._upload(words_of(numbered)), len(numbered)
        order = sorted_places(keys_there(self._words, [(0, count)], seed), count) if count else NOWHERE.take(1)
        self.take_there(self._words, order=order)
        return wait

    def take_there(self, words, begin: int = 0, order=None) -> None:
        """Take numbered rows that are on the device, uint32 [n, 42]: from row `begin` on as they are, or those at the
        places `order`, int64 on the device."""
        self._words, self._first, self._day, self._order = words, begin, -1, order

    def _upload(self, rows_: np.ndarray) -> Callable[[], None]:
        """Start to bring rows to the device; returns what waits until their memory on the host is free again."""
        count, width = rows_.shape
        rooms, arrived = _room.rows[width], _room.arrived[width]
        rooms.reverse(), arrived.reverse()
        _room.used.hold("up")
        self._words = rooms[0].take(count)
        if count:
            self._words[:count].copy_to_device(rows_.view(np.uint32), stream=stream("up"))
        arrived[0].put("up").hold("compute")
        return arrived[0].wait

    def finish(self, begin: int, end: int, records: np.ndarray) -> Callable[[], np.ndarray]:
        """See cpu.Finisher."""
        if begin == end:
            return lambda: records
        _room.records.reverse(), _room.copied.reverse()
        _room.copied[0].hold("compute")
        count, found = end - begin, _room.records[0].take(end - begin)
        order, in_order = (NOWHERE.take(1), 1) if self._order is None else (self._order, 0)
        launch(
            _finish, blocks_for(count * COLUMNS), self._words, self._first, order, in_order, begin, count, self._day,
            *self._fixed, found,
        )  # fmt: skip
        _room.used.put("compute")
        wait = fetch(found[:count], records, _room.copied[0])

        def arrived() -> np.ndarray:
            wait()
            return records

        return arrived
