"""What a machine could reach at a training step: by its operations, and by its bytes (leaf)."""

import time
from itertools import pairwise

import torch

from model.config import ModelConfig

SIDE, COPY_BYTES = 2048, 1 << 28


def _least_seconds(work, device: torch.device, repeat: int) -> float:
    """The best of some runs: a limit is what the machine can do when nothing else is on."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeat + 2):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def matrix_operations(dtype: torch.dtype, device: torch.device) -> float:
    """Operations/s of a product of two 2,048 x 2,048 matrices."""
    a, b = (torch.rand(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SIDE**3 / _least_seconds(lambda: torch.mm(a, b, out=out), device, 20)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written."""
    a = torch.zeros(COPY_BYTES // 4, device=device)
    b = torch.empty_like(a)
    return 2 * COPY_BYTES / _least_seconds(lambda: b.copy_(a), device, 5)


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
