"""The plain loader: blocks of rows read into memory of its own, on a GPU's behalf pinned and moved on a side stream."""

from collections.abc import Iterator, Sequence
from itertools import cycle

import torch

from gpu_etl.load.batch import Batch
from gpu_etl.load.loader import BlockReader, Loader, Unpacking, unpacked
from gpu_etl.load.order import Unit
from gpu_etl.load.unpack import CHUNK_ROWS, OutOfRangeError, Unpacker, empty_block

SLOTS = 3  # one is read into, one moves, one waits for the thread


class CpuLoader(Loader):
    """Batches of a split, as loader.Loader says."""

    name = "plain"

    def _made(self, epoch: int, start: int) -> Iterator[tuple[Sequence[int], Batch]]:
        units = self.order.units(epoch, start)
        if self._stream:
            return self._moved(units)
        return self._in_chunks(units) if self.order.window == 1 else self._in_windows(units)

    def _in_chunks(self, units: Iterator[Unit]) -> Iterator[tuple[Sequence[int], Batch]]:
        """On the CPU: few rows at a time are read and unpacked, so that they stay within the processor's cache."""
        unpacker = Unpacker(self.source.floats, self.source.logged, self.source.ends)
        chunk = empty_block(CHUNK_ROWS).numpy()
        for unit in units:
            whole, done = self._memory.empty_batch(sum(unit.sizes)), 0
            for begin, end in unit.reads:
                for low in range(begin, end, CHUNK_ROWS):
                    rows = chunk[: min(CHUNK_ROWS, end - low)]
                    self.source.read_into(low, low + len(rows), rows)
                    try:
                        unpacker.into(whole, done, done + len(rows), rows)
                    except OutOfRangeError as error:
                        self.source.refuse(low + error.place, low + error.place + 1)
                        raise self.source.changed() from error
                    done += len(rows)
            yield unit.sizes, whole

    def _in_windows(self, units: Iterator[Unit]) -> Iterator[tuple[Sequence[int], Batch]]:
        """On the CPU, rows from all over a window."""
        reader, unpacking = BlockReader(self.source), Unpacking(self.source, self._memory)
        for unit in units:
            block = self._memory.empty_block(unit.rows_read).numpy()
            reader.read(unit, block)
            yield from unpacking.batches(unit, block, unit.picks)
            del block

    def _moved(self, units: Iterator[Unit]) -> Iterator[tuple[Sequence[int], Batch]]:
        """On a GPU: the packed rows move as they are, and are unpacked there."""
        reader = BlockReader(self.source)
        with self._slots(SLOTS) as slots:
            for unit, slot in zip(units, cycle(slots), strict=False):
                slot.take()
                block, picks = slot.fill(unit, reader)
                with torch.cuda.stream(self._stream):
                    whole = unpacked(block.to(self.device, non_blocking=True), picks, self.source, self._bounds)
                    slot.give_back(self._stream.record_event())
                yield unit.sizes, whole
