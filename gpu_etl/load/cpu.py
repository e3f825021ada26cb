"""The plain loader: memory-mapped blocks of rows, unpacked by NumPy, one block a batch."""

from collections.abc import Iterator

import torch

from gpu_etl.load.batch import Batch, batch_ranges, make_batch
from gpu_etl.load.dataset import Source


class CpuLoader:
    """Batches of a split. len() is the number of batches in an epoch, the short last one included."""

    def __init__(self, source: Source, batch_size: int, device: torch.device, shuffle: bool = False, seed: int = 0):
        self.source, self.batch_size, self.device = source, batch_size, device
        self.shuffle, self.seed = shuffle, seed

    def __len__(self) -> int:
        return -(-self.source.rows // self.batch_size)

    def ranges(self, epoch: int, start: int) -> list[tuple[int, int]]:
        """Row ranges of the batches from number `start` of `epoch` on."""
        return batch_ranges(self.source.rows, self.batch_size, self.shuffle, self.seed, epoch)[start:]

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` of `epoch` on: the position to resume at is just these two numbers."""
        for begin, end in self.ranges(epoch, start):
            columns = map(torch.from_numpy, self.source.columns(begin, end))
            yield make_batch(*columns, logged=self.source.logged).to(self.device)
