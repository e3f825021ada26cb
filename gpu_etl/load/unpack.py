"""Blocks of packed rows -> batches: one compiled pass on the CPU, torch's operators on any device.

A packed row is 40 words of 32 bits in the order of the record (label, 13 numbers, 26 ids), whatever form it was read
from: label and numbers are int32 in records, the bits of float32 in other forms (`floats`); only those may be `logged`.
"""

import weakref
from collections import deque
from functools import cache

import numpy as np
import torch

from gpu_etl.common.jit import compiled
from gpu_etl.load.batch import Batch, log_dense, make_batch
from gpu_etl.schema import COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, SPARSE

KNOWN = 1 << 16  # numbers whose log is looked up: 256 KB; 1 % of Criteo's numbers are larger
SLICE = 1 << 10  # numbers of which torch takes the log in the calling thread; of more, it asks its other threads
CHUNK_ROWS = 1 << 11  # 320 KB: read, unpacked and logged within the second-level cache
IN_ORDER = np.empty(0, np.int64)
GROUP = 32  # rows that are fetched together where they lie all over a block
LINE = 16  # words of a cache line
SPARES = 4  # pieces of memory kept for the next ones
ANY_ID = np.full(SPARSE, 2**32 - 1, np.uint32)
LARGEST = np.float32(np.finfo(np.float32).max)


class OutOfRangeError(Exception):
    """A row of a block has a label, number or id that cannot be; place: its number among those that were asked for."""

    def __init__(self, place: int):
        super().__init__(place)
        self.place = place


class DeviceBounds:
    """What ids may be, and whether any value so far was none of those, on a device: nothing waits for the answer.

    last: the largest id of each column, uint32 [26]; ANY_ID for no limit. wrong: a bool scalar on the device.
    """

    def __init__(self, last: np.ndarray, device: torch.device):
        limited = (last < 2**31).all()
        self._last = torch.from_numpy(last.astype(np.int64)).int().to(device) if limited else None
        self._first = torch.zeros((), dtype=torch.int32, device=device)
        self.wrong = torch.zeros((), dtype=torch.bool, device=device)

    def numbers(self, label: torch.Tensor, dense: torch.Tensor, logged: bool) -> None:
        """Look at labels [B] and numbers [B, 13], int32 or float32."""
        self.wrong |= ((label != 0) & (label != 1)).any()
        if dense.is_floating_point():
            self.wrong |= ~dense.isfinite().all()
        if not logged:
            self.wrong |= (dense < 0).any()

    def ids(self, sparse: torch.Tensor) -> torch.Tensor:
        """Look at ids int32 [B, 26]; gives them back, wrong ones as others that are in range, so that no look-up reads
        beyond its table before anybody has seen `wrong`."""
        if self._last is None:
            return sparse
        held = torch.clamp(sparse, self._first, self._last)
        self.wrong |= (held != sparse).any()
        return held


@cache
def logs_of_integers() -> np.ndarray:
    """log(x + 1) float32 of x = 0 .. KNOWN - 1, by log_dense."""
    return torch.cat([log_dense(part) for part in torch.arange(KNOWN, dtype=torch.float32).split(SLICE)]).numpy()


def unpack_block(
    block: torch.Tensor, picks: torch.Tensor | None, floats: bool, logged: bool, bounds: DeviceBounds | None = None
) -> Batch:
    """The rows `picks` (int64 [n]; None: all) of packed rows int32 [m, 40] as one batch on the block's device.

    Moves 640 B a row (320 where there are no picks), with bounds 490 more. The specification of Unpacker.
    """
    if picks is not None:
        block = block.index_select(0, picks)
    label, dense = block[:, 0], block[:, FIRST_DENSE:FIRST_SPARSE]
    if floats:
        label, dense = label.contiguous().view(torch.float32), dense.contiguous().view(torch.float32)
    sparse = block[:, FIRST_SPARSE:].contiguous()
    if bounds:
        bounds.numbers(label, dense, logged)
        sparse = bounds.ids(sparse)
    if not floats:
        label, dense = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (label, dense))
    return make_batch(dense, sparse, label, logged)


@compiled
def _touch(block, picks):
    """Fetch rows from all over the block side by side: one after another, they would take three times as long."""
    touched = np.int32(0)
    for row in picks:
        touched ^= block[row, 0] ^ block[row, LINE] ^ block[row, 2 * LINE] ^ block[row, COLUMNS - 1]
    return touched


@compiled
def _unpack_integers(block, picks, logs, ends, dense, sparse, label, rest):
    """Records. Returns how many places of `dense` (flat; noted in rest) hold x + 1 still, of which the log is to be
    taken, and whether a label is neither 0 nor 1, a number negative, or an id of column c beyond ends[c], uint32 [26].
    Its loops have no branches that are often taken: 14 ns a row in place of 38."""
    left, last, wrong, labels = 0, np.uint32(KNOWN - 1), False, np.uint32(0)
    for i in range(len(label)):
        if len(picks) and i % GROUP == 0:
            rest[-1] = _touch(block, picks[i : i + GROUP])
        row = picks[i] if len(picks) else i
        label[i] = np.float32(block[row, 0])
        labels |= np.uint32(block[row, 0])
        every = np.uint32(0)
        for c in range(DENSE):
            x = np.uint32(block[row, FIRST_DENSE + c])
            every |= x
            dense[i, c] = logs[x & last]
        if every > last:
            wrong |= np.int32(every) < 0
            for c in range(DENSE):
                x = block[row, FIRST_DENSE + c]
                if np.uint32(x) > last:
                    dense[i, c] = np.float32(x) + np.float32(1)
                    rest[left] = i * DENSE + c
                    left += 1
        for c in range(SPARSE):
            number = block[row, FIRST_SPARSE + c]
            sparse[i, c] = number
            wrong |= np.uint32(number) > ends[c]
    return left, wrong or labels > 1


@compiled
def _unpack_floats(block, numbers, picks, logged, ends, dense, sparse, label, rest):
    """Forms whose numbers are floats, block's memory as float32. Returns and notes what _unpack_integers does; a number
    is wrong where it is not finite, or negative without `logged`."""
    left, wrong, good, least = 0, False, True, -LARGEST if logged else np.float32(0)
    for i in range(len(label)):
        if len(picks) and i % GROUP == 0:
            rest[-1] = _touch(block, picks[i : i + GROUP])
        row = picks[i] if len(picks) else i
        label[i] = numbers[row, 0]
        wrong |= (label[i] != 0) & (label[i] != 1)
        for c in range(DENSE):
            number = numbers[row, FIRST_DENSE + c]
            dense[i, c] = number
            good &= (number >= least) & (number <= LARGEST)  # a NaN is not good
        if not logged:
            for c in range(DENSE):
                dense[i, c] += np.float32(1)
                rest[left] = i * DENSE + c
                left += 1
        for c in range(SPARSE):
            number = block[row, FIRST_SPARSE + c]
            sparse[i, c] = number
            wrong |= np.uint32(number) > ends[c]
    return left, wrong or not good


class Unpacker:
    """Unpacks on the CPU, in the calling thread alone; for one thread at a time. The bits are those of unpack_block.

    ends: the largest id of each column, uint32 [26] (ANY_ID for no limit); None: nothing is looked at.
    """

    def __init__(self, floats: bool, logged: bool, ends: np.ndarray | None = None):
        self._floats, self._logged, self._ends = floats, logged, ends
        self._logs = logs_of_integers()
        self._rest = np.empty(CHUNK_ROWS * DENSE + 1, np.int64)

    def into(self, batch: Batch, begin: int, end: int, block: np.ndarray, picks: np.ndarray | None = None) -> None:
        """Fill rows begin to end of the batch (CPU) with the block's rows `picks`, int64 [end - begin]; None: its first
        ones. block: int32 [m, 40], C-contiguous. Raises OutOfRangeError for the first row that cannot be."""
        ends = ANY_ID if self._ends is None else self._ends
        for low in range(begin, end, CHUNK_ROWS):
            high = min(low + CHUNK_ROWS, end)
            columns = [tensor[low:high].numpy() for tensor in batch]
            rows = slice(low - begin, high - begin)
            some, of = (block[rows], IN_ORDER) if picks is None else (block, picks[rows])
            if self._floats:
                numbers = some.view(np.float32)
                left, wrong = _unpack_floats(some, numbers, of, self._logged, ends, *columns, self._rest)
            else:
                left, wrong = _unpack_integers(some, of, self._logs, ends, *columns, self._rest)
            if wrong and self._ends is not None:
                raise OutOfRangeError(low - begin + self._first_wrong(some if picks is None else some[of]))
            dense = columns[0].reshape(-1)
            for i in range(0, left, SLICE):
                places = self._rest[i : min(i + SLICE, left)]
                dense[places] = torch.from_numpy(dense[places]).log_().numpy()

    def _first_wrong(self, rows: np.ndarray) -> int:
        """The first of packed rows int32 [n, 40] with a value that cannot be."""
        numbers = rows.view(np.float32) if self._floats else rows
        label, dense = numbers[:, 0], numbers[:, FIRST_DENSE:FIRST_SPARSE]
        good = (label == 0) | (label == 1)
        good &= (np.isfinite(dense) if self._logged else (dense >= 0) & np.isfinite(dense)).all(1)
        good &= (rows[:, FIRST_SPARSE:].view(np.uint32) <= self._ends).all(1)
        return int(np.argmin(good))


class Memory:
    """Memory for batches and packed rows on the CPU, given to later ones once nobody holds a tensor of it any more.

    Fresh memory would take as long as all the rest: the system clears each page first. For use by any thread.
    """

    def __init__(self):
        self._spare = {width: deque[np.ndarray](maxlen=SPARES) for width in (1, DENSE, SPARSE, COLUMNS)}

    def _empty(self, rows: int, width: int, dtype: type) -> torch.Tensor:
        """[rows, width] of a type of 32 bits."""
        spare = self._spare[width]
        try:
            memory = spare.pop()
        except IndexError:
            memory = np.empty(0, dtype)
        if len(memory) < rows * width:
            memory = np.empty(rows * width, dtype)
        owner = memory[: rows * width]  # lives as long as any tensor made of it
        weakref.finalize(owner, spare.append, memory).atexit = False
        return torch.from_numpy(owner).view(rows, width)

    def empty_block(self, rows: int) -> torch.Tensor:
        """Packed rows, int32 [rows, 40], whose contents are undefined."""
        return self._empty(rows, COLUMNS, np.int32)

    def empty_batch(self, rows: int) -> Batch:
        """A batch whose contents are undefined."""
        dense, sparse = self._empty(rows, DENSE, np.float32), self._empty(rows, SPARSE, np.int32)
        return Batch(dense, sparse, self._empty(rows, 1, np.float32).view(-1))


def empty_block(rows: int, pinned: bool = False) -> torch.Tensor:
    """Memory for packed rows, int32 [rows, 40], its contents undefined; pinned: the GPU copies from it by itself."""
    return torch.empty(rows, COLUMNS, dtype=torch.int32, pin_memory=pinned)
