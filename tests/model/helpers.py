"""Small models and batches."""

from typing import NamedTuple

import torch

from model.config import ModelConfig

SIZES = (3, 11, 200, 1)


class Batch(NamedTuple):
    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor


def small_config(**changes) -> ModelConfig:
    values = {
        "num_numerical_features": 13,
        "categorical_feature_sizes": SIZES,
        "bottom_mlp_sizes": (16, 8),
        "top_mlp_sizes": (16, 1),
        "embedding_dim": 8,
    }
    return ModelConfig(**values | changes)


def random_batches(count: int, rows: int, seed: int = 0) -> list[Batch]:
    """Batches full of duplicate ids, with labels that depend on dense and sparse values."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        dense = torch.rand(rows, 13, generator=generator)
        sparse = torch.stack([torch.randint(size, (rows,), generator=generator) for size in SIZES], 1).int()
        score = 3 * dense[:, 0] - 1.5 + 2 * (sparse[:, 0] == 1) - 2 * (sparse[:, 1] < 4)
        label = (torch.rand(rows, generator=generator) < torch.sigmoid(score)).float()
        batches.append(Batch(dense, sparse, label))
    return batches


class ListLoader:
    """Batches from a list, with the interface of gpu_etl.load."""

    def __init__(self, batches):
        self._batches = batches

    def __len__(self):
        return len(self._batches)

    def batches(self, epoch: int = 0, start: int = 0):
        order = self._batches if epoch % 2 == 0 else self._batches[::-1]
        yield from order[start:]
