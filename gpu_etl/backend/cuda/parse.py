"""Text -> parsed rows on a GPU: the text goes up while earlier text is computed on, newlines are found, rows parsed.

The kernels of a slab find its rows by themselves: how many there are is read from the device's memory, so that the host
waits once a slab, for the rows, the faults and the slab's statistics together.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import cuda

from gpu_etl.backend.cuda.kernel import THREADS, blocks_for, kernel
from gpu_etl.backend.cuda.launch import Memory, Output, download, launch
from gpu_etl.backend.cuda.text import DeviceText, text_rooms
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.jit import compiled as device_function
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.scalar import INT32_MAX
from gpu_etl.rows.statistics import Summary
from gpu_etl.schema import COLUMNS, FIRST_SPARSE

CHUNK = 128  # bytes of text of one thread in the newline scan
ROW_BYTES = 128  # room for rows is made as if none was shorter; where more come, it grows
SUMMARY_BLOCKS = 64  # a column
# A slab's numbers on the device, int64: rows, rows with a fault, empty fields by column, labels, the smallest integer.
ROWS, BAD, EMPTY, CLICKS, SMALLEST = 0, 1, 2, 2 + COLUMNS, 3 + COLUMNS
NUMBERS = 4 + COLUMNS

TEXT, VALUES, MISSING, COUNTERS = "uint8[::1]", "uint32[::1, :]", "uint64[::1]", "int64[::1]"


@kernel("int64", COUNTERS)
def _begin(count, numbers):
    """Set a slab's numbers for `count` rows without faults. One block."""
    for i in range(cuda.threadIdx.x, NUMBERS, cuda.blockDim.x):
        value = 0
        if i == ROWS:
            value = count
        elif i == SMALLEST:
            value = INT32_MAX
        numbers[i] = value


@kernel(TEXT, "int64", "int32[::1]")
def _count_newlines(text, size, counts):
    """counts[b] = newlines in the text of block b: THREADS chunks of CHUNK bytes. Reads each byte once."""
    together = cuda.shared.array(1, np.int32)
    if cuda.threadIdx.x == 0:
        together[0] = 0
    cuda.syncthreads()
    begin = cuda.grid(1) * CHUNK
    found = 0
    for position in range(begin, min(begin + CHUNK, size)):
        found += rows.byte_at(text, position) == rows.NEWLINE
    if found:
        cuda.atomic.add(together, 0, found)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        counts[cuda.blockIdx.x] = together[0]


@device_function
def _sum_before(mine, shared):
    """Sum of `mine` of the block's threads before this one, by doubling steps (Hillis, Steele 1986)."""
    thread = cuda.threadIdx.x
    shared[thread] = mine
    cuda.syncthreads()
    step = 1
    while step < THREADS:
        more = 0
        if thread >= step:
            more = shared[thread - step]
        cuda.syncthreads()
        shared[thread] += more
        cuda.syncthreads()
        step *= 2
    return shared[thread] - mine


@kernel("int32[::1]", "int64", "int64", COUNTERS)
def scan(counts, count, more, total):
    """counts[i] = sum of those before it, of `count`; total[0] = sum of all + more. One block."""
    shared = cuda.shared.array(THREADS, np.int32)
    thread = cuda.threadIdx.x
    share = (count + THREADS - 1) // THREADS
    begin, end = min(thread * share, count), min((thread + 1) * share, count)
    mine = 0
    for i in range(begin, end):
        mine += counts[i]
    before = _sum_before(mine, shared)
    for i in range(begin, end):
        here = counts[i]
        counts[i] = before
        before += here
    if thread == THREADS - 1:
        total[0] = before + more


@kernel(TEXT, "int64", "int32[::1]", "int64", COUNTERS, "int64[::1]", "int64")
def _write_newlines(text, size, begins, open_ended, numbers, ends, room):
    """ends[begins[b] + i] = position of newline i of block b's text, as in _count_newlines, where there is room; the
    last row's, where it has none (open_ended), is the text's end."""
    shared = cuda.shared.array(THREADS, np.int32)
    begin = cuda.grid(1) * CHUNK
    end = min(begin + CHUNK, size)
    found = 0
    for position in range(begin, end):
        found += rows.byte_at(text, position) == rows.NEWLINE
    place = begins[cuda.blockIdx.x] + _sum_before(found, shared)
    for position in range(begin, end):
        if rows.byte_at(text, position) == rows.NEWLINE:
            if place < room:
                ends[place] = position
            place += 1
    if open_ended and cuda.grid(1) == 0 and numbers[ROWS] <= room:
        ends[numbers[ROWS] - 1] = size


@kernel(TEXT, "int64[::1]", VALUES, MISSING, "int32[::1]", COUNTERS, "int64")
def _parse(text, ends, values, missing, faults, numbers, room):
    """One thread a row; rows.parse_row does the work. Moves about 250 B of text in and 172 B out a row."""
    row = cuda.grid(1)
    if row < min(numbers[ROWS], room):
        begin = 0
        if row > 0:
            begin = ends[row - 1] + 1
        fault = rows.parse_row(text, begin, ends[row], row, values, missing)
        faults[row] = fault
        if fault:
            cuda.atomic.add(numbers, BAD, 1)


@kernel(VALUES, MISSING, COUNTERS, "int64")
def _summarize(values, missing, numbers, room):
    """Block (b, c) looks at a part of column c: numbers[EMPTY + c] += empty ones, numbers[CLICKS] += labels,
    numbers[SMALLEST]: the smallest integer. One or two atomics a thread."""
    column, empty_ones, clicks, least = cuda.blockIdx.y, 0, 0, np.int64(INT32_MAX)
    for row in range(cuda.grid(1), min(numbers[ROWS], room), cuda.gridDim.x * cuda.blockDim.x):
        is_empty = rows.is_missing(missing[row], column)
        empty_ones += is_empty
        if column == 0:
            clicks += np.int64(values[row, 0])
        elif column < FIRST_SPARSE:
            least = min(least, rows.signed32(np.int64(values[row, column])))
    if empty_ones:
        cuda.atomic.add(numbers, EMPTY + column, empty_ones)
    if clicks:
        cuda.atomic.add(numbers, CLICKS, clicks)
    if least < numbers[SMALLEST]:
        cuda.atomic.min(numbers, SMALLEST, least)


@dataclass
class Rows:
    """`count` parsed rows on the device, in the first ones of values uint32 [room, 40], column-major, and missing
    uint64 [room]; summary: of these very rows, where it is known."""

    values: Any
    missing: Any
    count: int
    summary: Summary | None = None

    def __len__(self) -> int:
        return self.count


class Table:
    """Device memory for the rows of a slab, used again."""

    def __init__(self, name: str):
        self._values, self._missing = Memory(name, np.uint32, COLUMNS, "F"), Memory(name, np.uint64)

    def take(self, count: int) -> Rows:
        """Room for so many rows; those of the call before are gone."""
        room = self._values.take(count)
        return Rows(room, self._missing.take(self._values.items), count)


@dataclass
class _Numbers:
    """A slab's numbers, on the device and on their way to the host."""

    device: Memory = field(default_factory=lambda: Memory("slab", np.int64))
    host: Output = field(default_factory=lambda: Output(np.int64))

    def begin(self, count: int):
        """The array, set for `count` rows."""
        numbers = self.device.take(NUMBERS)
        launch(_begin, 1, count, numbers)
        return numbers

    def read(self) -> tuple[int, int, Summary]:
        """Rows, rows with faults, and the summary; waits for the kernels launched so far."""
        rows_, bad, *empty, clicks, smallest = self.host.get(self.device.take(NUMBERS))().tolist()
        return rows_, bad, Summary(clicks, empty, smallest)


class _Parser:
    """What parse() works in: made once a process."""

    def __init__(self):
        self.table, self.numbers = Table("parsed rows"), _Numbers()
        self._counts, self._faults = Memory("slab", np.int32), Memory("slab", np.int32)
        self._ends = Memory("slab", np.int64)

    def parse(self, text: DeviceText) -> tuple[Rows, np.ndarray]:
        """The rows of a text, and their faults; of more than rows.most_rows(), only so many: see rows_end."""
        text.room.arrived.hold("compute")
        blocks, open_ended = blocks_for(-(-text.size // CHUNK)), int(text.last != rows.NEWLINE)
        numbers, counts, bytes_ = self.numbers.begin(0), self._counts.take(blocks), text.bytes
        launch(_count_newlines, blocks, bytes_, text.size, counts)
        launch(scan, 1, counts, blocks, open_ended, numbers)  # ROWS comes first in them
        room, most = max(text.size // ROW_BYTES + 1, self._ends.items), rows.most_rows(text.size)
        while True:
            found, bad, summary = self._attempt(text, bytes_, blocks, open_ended, room)
            if found <= room or room >= most:
                break
            room = min(found, most)
            launch(_begin, 1, found, numbers)
        text_rooms.give(text.room)
        count = min(found, room)
        text.rows_end = text.size if count == found else int(download(self._ends.array[count - 1 : count])[0]) + 1
        parsed = self.table.take(0)
        parsed.count, parsed.summary = count, None if bad else summary
        return parsed, download(self._faults.array[:count]) if bad else np.zeros(count, np.int32)

    def _attempt(self, text: DeviceText, bytes_, blocks: int, open_ended: int, room: int) -> tuple[int, int, Summary]:
        """Parse the rows of a text for which there is room; returns all rows, those with faults, and the summary."""
        numbers, counts = self.numbers.device.array, self._counts.array
        ends, faults, table = self._ends.take(room), self._faults.take(room), self.table.take(room)
        launch(_write_newlines, blocks, bytes_, text.size, counts, open_ended, numbers, ends, room)
        launch(_parse, blocks_for(room), bytes_, ends, table.values, table.missing, faults, numbers, room)
        text.room.free.put("compute")
        summarize_on_device(table, numbers, room)
        return self.numbers.read()


def summarize_on_device(table: Rows, numbers, room: int) -> None:
    """Add up in a slab's numbers what there is in its rows."""
    launch(_summarize, (min(SUMMARY_BLOCKS, blocks_for(room)), COLUMNS), table.values, table.missing, numbers, room)


parser = _Parser()


def parse(text: np.ndarray | None, uploaded: DeviceText | None, memory: ScratchBuffer | None = None):
    """Parse a slab of text that find_rows brought to the device (its copy on the host is not looked at). Returns its
    rows, until the next call, and their missing on the device, faults int32 [n] on the host."""
    if uploaded is None:
        return parser.table.take(0), parser.table.take(0).missing, np.empty(0, np.int32)
    found, faults = parser.parse(uploaded)
    return found, found.missing, faults


def rows_end(text: np.ndarray | None, uploaded: DeviceText | None) -> int:
    """Bytes of a slab of text that hold the rows that parse() gave; behind them are rows for another slab."""
    return uploaded.rows_end if uploaded else 0
