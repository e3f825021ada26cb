"""What a machine could reach at a training step: by its operations, and by its bytes."""

from itertools import pairwise

import torch

from bench import timing
from model.config import ModelConfig

# A GPU does a product of 2,048 x 2,048 in less time than it takes to launch it and to wait for it.
SIDE, COPY_BYTES, CALLS = {"cpu": 2048, "cuda": 8192}, {"cpu": 1 << 28, "cuda": 1 << 30}, {"cpu": 1, "cuda": 10}


def _least_seconds(work, device: torch.device, repeat: int) -> float:
    """The best of some runs: a limit is what the machine can do when nothing else is on."""
    return min([timing.seconds(work, device, CALLS[device.type]) for _ in range(repeat + 2)][2:])


def matrix_operations(dtype: torch.dtype, device: torch.device) -> float:
    """Operations/s of a product of two square matrices."""
    side = SIDE[device.type]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _least_seconds(lambda: torch.mm(a, b, out=out), device, 20)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written."""
    size = COPY_BYTES[device.type]
    a = torch.zeros(size // 4, device=device)
    b = torch.empty_like(a)
    return 2 * size / _least_seconds(lambda: b.copy_(a), device, 5)


def _widths(config: ModelConfig) -> tuple[list[int], list[int], int]:
    """Of the layers of both MLPs, and how many pairs of vectors are multiplied."""
    vectors = 1 + len(config.categorical_feature_sizes)
    pairs = vectors * (vectors - 1) // 2
    bottom = [config.num_numerical_features, *config.bottom_mlp_sizes]
    return bottom, [config.embedding_dim + pairs + 1, *config.top_mlp_sizes], pairs


def mlp_operations(config: ModelConfig) -> int:
    """Of one sample, forward and backward, in the MLPs (the first layer has no input to differentiate by)."""
    bottom, top, _ = _widths(config)
    return 6 * sum(a * b for sizes in (bottom, top) for a, b in pairwise(sizes)) - 2 * bottom[0] * bottom[1]


def operations(config: ModelConfig) -> int:
    """Of one sample, forward and backward: MLPs and dot interaction."""
    return mlp_operations(config) + 6 * _widths(config)[2] * config.embedding_dim


def table_bytes(config: ModelConfig) -> int:
    """Of one sample, at least: every row is read in the forward pass, and read and written in the update; and the 160
    bytes of its record."""
    return 3 * 4 * len(config.categorical_feature_sizes) * config.embedding_dim + 160
