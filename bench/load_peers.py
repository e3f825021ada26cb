"""torch's DataLoader on the same files: row by row, as a first attempt would write it, and on blocks."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from gpu_etl.load.batch import Batch, make_batch
from gpu_etl.load.sources import Source


class Blocks(Dataset):
    """A batch at a time: consecutive rows, unpacked by NumPy."""

    def __init__(self, source: Source, batch_size: int):
        self._source, self._batch_size = source, batch_size

    def __len__(self) -> int:
        return -(-self._source.rows // self._batch_size)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        begin = number * self._batch_size
        columns = self._source.columns(begin, min(begin + self._batch_size, self._source.rows))
        return tuple(make_batch(*map(torch.from_numpy, columns), logged=self._source.logged))


class Rows(Blocks):
    """A row at a time."""

    def __init__(self, source: Source):
        super().__init__(source, 1)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[0] for tensor in super().__getitem__(number))


def data_loader(dataset: Dataset, workers: int, device: torch.device, **more) -> Callable[[], Iterator[Batch]]:
    """Batches of a shuffled DataLoader on the device, from pinned memory where that is a GPU."""
    more = {"batch_size": None, "persistent_workers": workers > 0} | more
    loader = DataLoader(dataset, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda", **more)

    def batches() -> Iterator[Batch]:
        for tensors in loader:
            yield Batch(*tensors).to(device)

    return batches


def per_row(source: Source, batch_size: int, device: torch.device) -> Callable[[], Iterator[Batch]]:
    """Batches of rows collated one by one."""
    return data_loader(Rows(source), 0, device, batch_size=batch_size)
