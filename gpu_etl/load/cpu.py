"""The plain loader: memory-mapped blocks of rows, unpacked by NumPy, one block a batch."""

from collections.abc import Iterator

import torch

from gpu_etl.load.batch import Batch, batch_ranges, make_batch, rank_range
from gpu_etl.load.dataset import Source


class CpuLoader:
    """Batches of a split; of `world` ranks, `rank`'s share of each (batch.rank_range). len() is the number of batches
    in an epoch, the short last one included."""

    def __init__(
        self, source: Source, batch_size: int, device: torch.device, shuffle: bool = False, seed: int = 0,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.source, self.batch_size, self.device = source, batch_size, device
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world

    def __len__(self) -> int:
        return -(-self.source.rows // self.batch_size)

    def ranges(self, epoch: int, start: int) -> list[tuple[int, int]]:
        """Row ranges of the batches from number `start` of `epoch` on, all ranks' rows."""
        return batch_ranges(self.source.rows, self.batch_size, self.shuffle, self.seed, epoch)[start:]

    def rank_ranges(self, epoch: int, start: int) -> list[tuple[int, int]]:
        """This rank's rows of the same."""
        return [rank_range(*rows, self.rank, self.world) for rows in self.ranges(epoch, start)]

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` of `epoch` on: the position to resume at is just these two numbers."""
        for begin, end in self.rank_ranges(epoch, start):
            columns = map(torch.from_numpy, self.source.columns(begin, end))
            yield make_batch(*columns, logged=self.source.logged).to(self.device)
