"""The plain loader: blocks of rows read into memory of its own, on a GPU's behalf pinned and moved on a side stream."""

from collections.abc import Iterator
from itertools import cycle

import torch

from gpu_etl.load.batch import Batch
from gpu_etl.load.loader import BlockReader, Loader, Slot, unpacked
from gpu_etl.load.order import Unit
from gpu_etl.load.unpack import CHUNK_ROWS, BatchMemory, Unpacker, empty_block

SLOTS = 3  # one is read into, one moves, one waits for the thread


class CpuLoader(Loader):
    """Batches of a split, as loader.Loader says."""

    name = "cpu"

    def _units(self, epoch: int, start: int) -> Iterator[tuple[Unit, Batch]]:
        units = self.order.units(epoch, start)
        return self._moved(units) if self._stream else self._unpacked(units)

    def _unpacked(self, units: Iterator[Unit]) -> Iterator[tuple[Unit, Batch]]:
        """On the CPU: few rows at a time are read and unpacked, so that they stay within the processor's cache."""
        source, reader = self.source, BlockReader(self.source)
        unpacker, memory = Unpacker(source.floats, source.logged), BatchMemory()
        chunk, window = empty_block(CHUNK_ROWS).numpy(), empty_block(0)
        for unit in units:
            whole, done = memory.empty_batch(sum(unit.sizes)), 0
            if unit.picks is None:
                for begin, end in unit.reads:
                    for low in range(begin, end, CHUNK_ROWS):
                        rows = chunk[: min(CHUNK_ROWS, end - low)]
                        source.read_into(low, low + len(rows), rows)
                        unpacker.into(whole, done, done + len(rows), rows)
                        done += len(rows)
            else:
                if unit.rows_read > len(window):
                    window = empty_block(unit.rows_read)
                block = window[: unit.rows_read].numpy()
                reader.read(unit, block)
                unpacker.into(whole, 0, len(unit.picks), block, unit.picks)
            yield unit, whole

    def _moved(self, units: Iterator[Unit]) -> Iterator[tuple[Unit, Batch]]:
        """On a GPU: the packed rows move as they are, and are unpacked there."""
        reader = BlockReader(self.source)
        for unit, slot in zip(units, cycle([Slot(pinned=True) for _ in range(SLOTS)]), strict=False):
            slot.take()
            block, picks = slot.fill(unit, reader)
            with torch.cuda.stream(self._stream):
                whole = unpacked(block.to(self.device, non_blocking=True), picks, self.source)
                slot.give_back(self._stream.record_event())
            yield unit, whole
