"""Blocks of packed rows -> batches: one compiled pass on the CPU, torch's operators on any device.

A packed row is 40 words of 32 bits in the order of the record (label, 13 numbers, 26 ids), whatever form it was read
from: label and numbers are int32 in records, the bits of float32 in other forms (`floats`); only those may be `logged`.
"""

import weakref
from collections import deque
from functools import cache

import numpy as np
import torch

from gpu_etl.jit import compiled
from gpu_etl.load.batch import Batch, log_dense, make_batch
from gpu_etl.schema import COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, SPARSE

KNOWN = 1 << 16  # numbers whose log is looked up: 256 KB; 1 % of Criteo's numbers are larger
SLICE = 1 << 10  # numbers of which torch takes the log in the calling thread; of more, it asks its other threads
CHUNK_ROWS = 1 << 11  # 320 KB: read, unpacked and logged within the second-level cache
IN_ORDER = np.empty(0, np.int64)
GROUP = 32  # rows that are fetched together where they lie all over a block
LINE = 16  # words of a cache line
SPARES = 4  # pieces of memory kept for the next ones


@cache
def logs_of_integers() -> np.ndarray:
    """log(x + 1) float32 of x = 0 .. KNOWN - 1, by log_dense."""
    return torch.cat([log_dense(part) for part in torch.arange(KNOWN, dtype=torch.float32).split(SLICE)]).numpy()


def unpack_block(block: torch.Tensor, picks: torch.Tensor | None, floats: bool, logged: bool) -> Batch:
    """The rows `picks` (int64 [n]; None: all) of packed rows int32 [m, 40] as one batch on the block's device.

    Moves 640 B a row (320 where there are no picks). The specification of Unpacker.
    """
    if picks is not None:
        block = block.index_select(0, picks)
    label, dense = block[:, 0], block[:, FIRST_DENSE:FIRST_SPARSE]
    if floats:
        label, dense = label.contiguous().view(torch.float32), dense.contiguous().view(torch.float32)
    else:
        label, dense = (x.to(torch.float32, memory_format=torch.contiguous_format) for x in (label, dense))
    return make_batch(dense, block[:, FIRST_SPARSE:].contiguous(), label, logged)


@compiled
def _touch(block, picks):
    """Fetch rows from all over the block side by side: one after another, they would take three times as long."""
    touched = np.int32(0)
    for row in picks:
        touched ^= block[row, 0] ^ block[row, LINE] ^ block[row, 2 * LINE] ^ block[row, COLUMNS - 1]
    return touched


@compiled
def _unpack_integers(block, picks, logs, dense, sparse, label, rest):
    """Records. Returns how many places of `dense` (flat; noted in rest) hold x + 1 still, of which the log is to be
    taken. Its loops have no branches that are often taken: 14 ns a row in place of 38."""
    left, last = 0, np.uint32(KNOWN - 1)
    for i in range(len(label)):
        if len(picks) and i % GROUP == 0:
            rest[-1] = _touch(block, picks[i : i + GROUP])
        row = picks[i] if len(picks) else i
        label[i] = np.float32(block[row, 0])
        every = np.uint32(0)
        for c in range(DENSE):
            x = np.uint32(block[row, FIRST_DENSE + c])
            every |= x
            dense[i, c] = logs[x & last]
        if every > last:
            for c in range(DENSE):
                x = block[row, FIRST_DENSE + c]
                if np.uint32(x) > last:
                    dense[i, c] = np.float32(x) + np.float32(1)
                    rest[left] = i * DENSE + c
                    left += 1
        for c in range(SPARSE):
            sparse[i, c] = block[row, FIRST_SPARSE + c]
    return left


@compiled
def _unpack_floats(block, numbers, picks, logged, dense, sparse, label, rest):
    """Forms whose numbers are floats, block's memory as float32. Returns and notes what _unpack_integers does."""
    left = 0
    for i in range(len(label)):
        if len(picks) and i % GROUP == 0:
            rest[-1] = _touch(block, picks[i : i + GROUP])
        row = picks[i] if len(picks) else i
        label[i] = numbers[row, 0]
        for c in range(DENSE):
            dense[i, c] = numbers[row, FIRST_DENSE + c]
        if not logged:
            for c in range(DENSE):
                dense[i, c] += np.float32(1)
                rest[left] = i * DENSE + c
                left += 1
        for c in range(SPARSE):
            sparse[i, c] = block[row, FIRST_SPARSE + c]
    return left


class Unpacker:
    """Unpacks on the CPU, in the calling thread alone; for one thread at a time. The bits are those of unpack_block."""

    def __init__(self, floats: bool, logged: bool):
        self._floats, self._logged = floats, logged
        self._logs = logs_of_integers()
        self._rest = np.empty(CHUNK_ROWS * DENSE + 1, np.int64)

    def into(self, batch: Batch, begin: int, end: int, block: np.ndarray, picks: np.ndarray | None = None) -> None:
        """Fill rows begin to end of the batch (CPU) with the block's rows `picks`, int64 [end - begin]; None: its first
        ones. block: int32 [m, 40], C-contiguous."""
        for low in range(begin, end, CHUNK_ROWS):
            high = min(low + CHUNK_ROWS, end)
            columns = [tensor[low:high].numpy() for tensor in batch]
            rows = slice(low - begin, high - begin)
            some, of = (block[rows], IN_ORDER) if picks is None else (block, picks[rows])
            if self._floats:
                left = _unpack_floats(some, some.view(np.float32), of, self._logged, *columns, self._rest)
            else:
                left = _unpack_integers(some, of, self._logs, *columns, self._rest)
            dense = columns[0].reshape(-1)
            for i in range(0, left, SLICE):
                places = self._rest[i : min(i + SLICE, left)]
                dense[places] = torch.from_numpy(dense[places]).log_().numpy()


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
