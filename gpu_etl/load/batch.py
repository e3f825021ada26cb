"""The batch, and the order in which a training split's batches come."""

from typing import NamedTuple

import numpy as np
import torch

from gpu_etl.rows.random_keys import row_keys


class Batch(NamedTuple):
    """dense float32 [B, 13], log(x + 1) of the record's integers; sparse int32 [B, 26], ids; label float32 [B].

    All contiguous, on one device, and not touched again by the loader.
    """

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; itself if it is there."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def log_dense(dense: torch.Tensor) -> torch.Tensor:
    """log(x + 1) of float32 integers, in place, as facebookresearch/dlrm takes it at load: log(float32(x) + 1)."""
    return dense.add_(1.0).log_()


def make_batch(dense: torch.Tensor, sparse: torch.Tensor, label: torch.Tensor, logged: bool) -> Batch:
    """dense float32 [B, 13], sparse int32 [B, 26], label float32 [B] -> batch; the log is taken unless `logged`."""
    return Batch(dense if logged else log_dense(dense), sparse, label)


def batch_ranges(rows: int, batch_size: int, shuffle: bool, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Row ranges (begin, end) of an epoch's batches, in order.

    With `shuffle` the full batches come in an order that depends on seed and epoch only; a short last batch stays last.
    """
    ranges = [(begin, min(begin + batch_size, rows)) for begin in range(0, rows, batch_size)]
    if not shuffle:
        return ranges
    full = rows // batch_size
    epoch_seed = int(row_keys(seed, epoch, 1)[0])
    return [ranges[i] for i in np.argsort(row_keys(epoch_seed, 0, full))] + ranges[full:]


def rank_range(begin: int, end: int, rank: int, world: int) -> tuple[int, int]:
    """The rows of a global batch begin to end that are `rank`'s of `world`: consecutive, and as many as any other's or
    one fewer or more; none where there are more ranks than rows."""
    rows = end - begin
    return begin + rows * rank // world, begin + rows * (rank + 1) // world
