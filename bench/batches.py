"""Made-up batches, their ids as popular as those of the synthetic days, and models cut to fit."""

import numpy as np
import torch

from gpu_etl.load.batch import Batch
from gpu_etl.raw.synthetic import POPULARITY
from gpu_etl.schema import DENSE
from model.config import ModelConfig

FRESH_BATCHES = 8  # rotated, so that no step finds its rows in the cache because the last one used them


def fit_tables(config: ModelConfig, limit: float) -> ModelConfig:
    """The configuration with its largest tables cut, all to one number of rows, to `limit` bytes in float32."""
    row, sizes = 4 * config.embedding_dim, sorted(config.categorical_feature_sizes)
    left = int(limit // row)
    for i, size in enumerate(sizes):
        if size * (len(sizes) - i) > left:
            largest = max(1, left // (len(sizes) - i))
            return config.with_tables([min(size, largest) for size in config.categorical_feature_sizes])
        left -= size
    return config


def draw_ids(sizes: tuple[int, ...], rows: int, generator: np.random.Generator) -> np.ndarray:
    """Ids int32 [rows, T] by a power law, as popular as the synthetic days' values."""
    power = 1 - POPULARITY
    limits = np.array(sizes)
    ranks = (((limits + 1.0) ** power - 1) * generator.random((rows, len(sizes))) + 1) ** (1 / power) - 1
    return np.minimum(ranks, limits - 1).astype(np.int32)


def make_ids(sizes: tuple[int, ...], batch_size: int, device: torch.device) -> list[torch.Tensor]:
    """FRESH_BATCHES times ids int32 [B, T]."""
    generators = map(np.random.default_rng, range(FRESH_BATCHES))
    return [torch.from_numpy(draw_ids(sizes, batch_size, generator)).to(device) for generator in generators]


def make_batches(sizes: tuple[int, ...], batch_size: int, device: torch.device) -> list[Batch]:
    """FRESH_BATCHES batches with random numbers and labels."""
    random = torch.Generator().manual_seed(0)
    return [
        Batch(
            (torch.rand(batch_size, DENSE, generator=random) * 5).to(device), ids,
            torch.randint(2, (batch_size,), generator=random).float().to(device),
        )
        for ids in make_ids(sizes, batch_size, device)
    ]  # fmt: skip
