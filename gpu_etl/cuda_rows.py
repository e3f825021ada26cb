"""Text -> parsed rows on a GPU: the text goes up while earlier text is computed on, newlines are found, rows parsed."""

import numpy as np
from numba import cuda

from gpu_etl import rows
from gpu_etl.cuda_launch import (
    THREADS,
    Upload,
    blocks_for,
    budget,
    download,
    empty,
    launch,
    stream,
    text_room,
    upload_array,
)
from gpu_etl.memory import Pool, Reused
from gpu_etl.schema import COLUMNS

# Bytes per byte of a slab's text: row ends, values, missing and faults; new slots when it is coded; places and numbered
# rows when it is grouped, and those of the slab before, which are still on their way to the host. Rows have 200 bytes
# or more.
SLAB_FACTOR = 4
CHUNK_WORDS = 16  # of 8 bytes, of one thread in the newline scan


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
def _parse(text, ends, values, missing, faults, bad):
    """One thread a row; rows.parse_row does the work. bad[0] += rows with a fault. Moves about 250 B of text in and
    172 B out a row."""
    row = cuda.grid(1)
    if row < len(ends):
        begin = 0
        if row > 0:
            begin = ends[row - 1] + 1
        fault = rows.parse_row(text, begin, ends[row], row, values, missing)
        faults[row] = fault
        if fault:
            cuda.atomic.add(bad, 0, 1)


_rooms = Pool(text_room)


def take_room(size: int):
    """Device memory for text, uint8 [size or more], which parse() or give_room() takes back."""
    return _rooms.take(1 << (size - 1).bit_length())


def give_room(room) -> None:
    """Take back what take_room() gave; nothing on the device may read it any more."""
    _rooms.give(room)


def find_rows(text: np.ndarray) -> Upload | None:
    """Start to bring a slab of text, uint8 [bytes] in pinned memory, to the device, where parse finds its rows.

    The CPU's twin finds them; both run in the thread that reads ahead.
    """
    return Upload(text, take_room(len(text))) if len(text) else None


def _rows_on_device(text, last: int):
    """Row ends int64 [n] on the device, as cpu.find_rows gives them."""
    blocks = blocks_for(-(-len(text) // (CHUNK_WORDS * 8)))
    counts = upload_array(np.zeros(blocks, np.int32))
    launch(_count_newlines, blocks, text, counts)
    found = download(counts).astype(np.int64)
    open_ended = last != rows.NEWLINE
    ends = empty(int(found.sum()) + open_ended, np.int64)
    launch(_write_newlines, blocks, text, upload_array(np.cumsum(found) - found), ends)
    if open_ended:
        ends[len(ends) - 1 :].copy_to_device(np.array([len(text)]), stream=stream("compute"))
    return ends


def parse(text: np.ndarray | None, uploaded: Upload | None, memory: Reused | None = None):
    """Parse a slab of text that find_rows brought to the device (its copy on the host is not looked at). Returns values
    and missing on the device, faults on the host."""
    values = empty((0, COLUMNS), np.uint32, "F")
    if uploaded is None:
        return values, empty(0, np.uint64), np.empty(0, np.int32)
    budget.take("a slab's buffers", SLAB_FACTOR * len(uploaded.bytes))
    uploaded.wait()
    ends = _rows_on_device(uploaded.bytes, uploaded.last)
    count = len(ends)
    values, missing, faults = empty((count, COLUMNS), np.uint32, "F"), empty(count, np.uint64), empty(count, np.int32)
    bad = upload_array(np.zeros(1, np.int32))
    launch(_parse, blocks_for(count), uploaded.bytes, ends, values, missing, faults, bad)
    some_bad = bool(download(bad)[0])  # waits for the kernel: the text's memory is free now
    give_room(uploaded.room)
    return values, missing, download(faults) if some_bad else np.zeros(count, np.int32)
