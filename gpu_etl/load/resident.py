"""The whole split in the memory of the device that trains: read once, then batches by row number."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gpu_etl.common.errors import DataError
from gpu_etl.load.batch import Batch
from gpu_etl.load.loader import Loader, Unpacking, unpacked
from gpu_etl.load.sources import Source
from gpu_etl.load.unpack import empty_block
from gpu_etl.schema import COLUMNS, RECORD_BYTES

LOAD_ROWS = 1 << 18
LEFT_FREE = 0.05  # of the memory that is free, for what else must fit


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(info["MemAvailable"].removesuffix("kB")) * 1024


class ResidentLoader(Loader):
    """Same interface and batches as CpuLoader. Takes 160 B a row of the device's memory.

    Raises DataError where that does not fit.
    """

    name = "device-resident"

    def __init__(self, source: Source, batch_size: int, device: torch.device, *order, **more):
        super().__init__(source, batch_size, device, *order, **more)
        needed, free = source.rows * RECORD_BYTES, free_bytes(self.device)
        if needed > free * (1 - LEFT_FREE):
            raise DataError(
                f"--cache device: {source.path} takes {needed / 1e9:.1f} GB on {self.device}, of which "
                f"{free / 1e9:.1f} GB are free; train without it"
            )
        self._rows = torch.empty(source.rows, COLUMNS, dtype=torch.int32, device=self.device)
        part = empty_block(min(LOAD_ROWS, source.rows), pinned=self.device.type == "cuda")
        for begin in range(0, source.rows, LOAD_ROWS):
            end = min(begin + LOAD_ROWS, source.rows)
            source.read_into(begin, end, part[: end - begin].numpy())
            self._rows[begin:end].copy_(part[: end - begin])

    def _made(self, epoch: int, start: int) -> Iterator[tuple[Sequence[int], Batch]]:
        unpacking = Unpacking(self.source, self._memory)
        for unit in self.order.units(epoch, start, in_memory=True):
            rows = unit.rows()
            if self._stream:
                with torch.cuda.stream(self._stream):
                    whole = unpacked(self._rows, torch.from_numpy(rows).pin_memory(), self.source, self._bounds)
                yield unit.sizes, whole
            else:
                yield from unpacking.batches(unit, self._rows.numpy(), rows)
