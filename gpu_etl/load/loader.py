"""What all loaders have in common: the order of batches, making them ahead in a thread, handing them to the trainer."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from gpu_etl.common.errors import DataError
from gpu_etl.common.threads import prefetch
from gpu_etl.load import order
from gpu_etl.load.batch import Batch
from gpu_etl.load.order import UNIT_ROWS, Order, Unit
from gpu_etl.load.sources import Source
from gpu_etl.load.unpack import DeviceBounds, Memory, OutOfRangeError, Unpacker, empty_block, unpack_block

PREFETCH = 2  # units
CHECK_ROWS = 1 << 18
READ_ROWS = 1 << 13  # of a block, by one thread at a time
READERS = max(1, min(4, (os.cpu_count() or 1) // 4))  # threads; one copies 5 to 10 GB/s out of the page cache


class Loader:
    """Batches of a split on `device`; the same ones, bit for bit, whichever kind of loader reads them.

    shuffle, seed, buffer, rank, world: the order (order.Order). ahead: units (batches, where these are of 32,768 rows
    or more; 131,072 on a GPU) made ahead in a thread. len() is the number of batches in an epoch, the short last one
    included; it is the same on every rank.
    """

    name = ""

    def __init__(
        self, source: Source, batch_size: int, device: torch.device, shuffle: bool = False, seed: int = 0,
        buffer: int = 0, rank: int = 0, world: int = 1, ahead: int = PREFETCH,
    ):  # fmt: skip
        self.source, self.device, self.ahead = source, torch.device(device), ahead
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        at_once = order.GPU_UNIT_ROWS if self.device.type == "cuda" else order.UNIT_ROWS
        self.order = Order(source.rows, batch_size, shuffle, seed, buffer, rank, world, at_once)
        if self.order.window == 1:  # else a batch's rows come from all over its window, and no range tells them
            self.ranges = self.order.ranges
        self._memory, self._spare_slots = Memory(), deque()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with torch.cuda.stream(self._stream):  # which alone works with them; None: no stream at all
            self._bounds = DeviceBounds(source.ends, self.device) if self._stream else None

    def __len__(self) -> int:
        return len(self.order)

    def __str__(self) -> str:
        return f"{self.name} loader on {self.device}"

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` of `epoch` on: the position to resume at is just these two numbers.

        Raises DataError where a file has become shorter, a value cannot be (on a GPU only with the last batch, or by
        check()) or reading fails in another way, OSError where a file cannot be read; the batches before are good.
        """
        for sizes, whole, ready in prefetch(self._guarded(epoch, start), self.ahead):
            if ready:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(ready)
                for tensor in whole:  # or the allocator would give its memory away once it is dropped here
                    tensor.record_stream(stream)
            if len(sizes) == 1:
                yield whole
            else:
                yield from map(Batch, *(tensor.split(sizes) for tensor in whole))
        self.check()

    def check(self) -> None:
        """Raise DataError, naming file, row and column, where a value in the batches made so far cannot be. Waits for a
        GPU; on a CPU such values never become batches."""
        if not self._bounds:
            return
        with torch.cuda.stream(self._stream):
            if not self._bounds.wrong.item():
                return
        for begin in range(0, self.source.rows, CHECK_ROWS):
            self.source.refuse(begin, min(begin + CHECK_ROWS, self.source.rows))
        raise self.source.changed()

    def _guarded(self, epoch: int, start: int) -> Iterator[tuple[list[int], Batch, torch.cuda.Event | None]]:
        """Sizes of some batches, these as one, and the event after which they are there (None: at once)."""
        try:
            if self._stream:
                torch.cuda.set_device(self.device)  # of this thread: or it would take some memory of the first GPU
            for sizes, whole in self._made(epoch, start):
                yield list(sizes), whole, self._stream and self._stream.record_event()
        except (DataError, OSError):
            raise
        except Exception as error:
            raise DataError(
                f"{self.source.path}: the thread that reads batches ahead of epoch {epoch + 1} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _made(self, epoch: int, start: int) -> Iterator[tuple[Sequence[int], Batch]]:
        """Sizes of some batches, and these as one; on a GPU made on self._stream. Runs in the thread."""
        raise NotImplementedError

    @contextmanager
    def _slots(self, count: int):
        """So many slots, kept from one epoch to the next: pinning memory takes longer than filling it."""
        slots = []
        try:
            while len(slots) < count:
                slots.append(self._spare_slots.pop() if self._spare_slots else Slot(self._stream is not None))
            yield slots
        finally:
            for slot in slots:
                slot.taken = False
            self._spare_slots.extend(slots)


class Unpacking:
    """Batches on the CPU out of packed rows there."""

    def __init__(self, source: Source, memory: Memory):
        self._source, self._memory = source, memory
        self._unpacker = Unpacker(source.floats, source.logged, source.ends)

    def batches(self, unit: Unit, block: np.ndarray, picks: np.ndarray | None) -> Iterator[tuple[list[int], Batch]]:
        """Sizes of some batches, and these as one, until all of the unit's are made."""
        done, rows, sizes = 0, 0, []
        for number, size in enumerate(unit.sizes):
            sizes.append(size)
            rows += size
            if rows >= UNIT_ROWS or number == len(unit.sizes) - 1:
                whole, some = self._memory.empty_batch(rows), slice(done, done + rows)
                of = (block[some], None) if picks is None else (block, picks[some])
                try:
                    self._unpacker.into(whole, 0, rows, *of)
                except OutOfRangeError as error:
                    row = int(unit.rows()[done + error.place])
                    self._source.refuse(row, row + 1)
                    raise self._source.changed() from error
                yield sizes, whole
                done, rows, sizes = done + rows, 0, []


class BlockReader:
    """Reads the rows of units, by several threads where there are cores for it."""

    def __init__(self, source: Source):
        self._source = source
        self._pool = ThreadPoolExecutor(READERS, "read") if READERS > 1 else None

    def read(self, unit: Unit, block: np.ndarray) -> None:
        """Fill block, int32 [unit.rows_read, 40], with what the unit reads, packed."""
        parts, done = [], 0
        for begin, end in unit.reads:
            for low in range(begin, end, READ_ROWS):
                rows = min(READ_ROWS, end - low)
                parts.append((low, low + rows, block[done : done + rows]))
                done += rows
        run = self._pool.map if self._pool else map
        for _ in run(self._source.read_into, *zip(*parts, strict=True)) if parts else ():
            pass


class Slot:
    """Pinned host memory for the blocks of one unit and its picks, which a GPU copies out by itself."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._block, self._picks = empty_block(0), torch.empty(0, dtype=torch.int64)
        self._free: torch.cuda.Event | None = None
        self._held: object = None
        self.taken = False

    def take(self) -> None:
        """Wait until what the slot held is not read any more."""
        if self.taken:
            raise RuntimeError("a slot is filled again that was not given back")
        if self._free:
            self._free.synchronize()
        self.taken, self._free, self._held = True, None, None

    def give_back(self, free: torch.cuda.Event | None = None, held: object = None) -> None:
        """It may be filled again after the event; `held` is kept alive until then."""
        self.taken, self._free, self._held = False, free, held

    def fill(self, unit: Unit, reader: BlockReader) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The unit's packed rows, and its picks, in the slot's memory."""
        if unit.rows_read > len(self._block):
            self._block = empty_block(unit.rows_read, self._pinned)
        block = self._block[: unit.rows_read]
        reader.read(unit, block.numpy())
        if unit.picks is None:
            return block, None
        if len(unit.picks) > len(self._picks):
            self._picks = torch.empty(len(unit.picks), dtype=torch.int64, pin_memory=self._pinned)
        picks = self._picks[: len(unit.picks)]
        picks.copy_(torch.from_numpy(unit.picks))
        return block, picks


def unpacked(block: torch.Tensor, picks: torch.Tensor | None, source: Source, bounds: DeviceBounds | None) -> Batch:
    """Packed rows of a source, or those of them that are picked, as a batch on the block's device."""
    if picks is not None:
        picks = picks.to(block.device, non_blocking=True)
    return unpack_block(block, picks, source.floats, source.logged, bounds)
