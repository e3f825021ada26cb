"""The training step with official_config, beside torch's EmbeddingBag with sparse gradients in the same run."""

import argparse
import statistics
import sys
import time

import torch
from torch import nn

from gpu_etl.load.batch import Batch
from gpu_etl.synthetic import POPULARITY
from model.config import read_config
from model.device import choose_device
from model.dlrm import DLRM
from model.engine import Precision, Trainer
from model.schedule import Schedule

FRESH_BATCHES = 8  # rotated, so that no step finds its rows in the cache because the last one used them


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model_config", default="official_config", metavar="NAME|FILE")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[2048, 16384], metavar="B")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, each (default: 5)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))


class EmbeddingBags(nn.Module):
    """The embedding of facebookresearch/dlrm: an EmbeddingBag a table, sparse gradients, torch's SGD."""

    def __init__(self, tables: tuple[torch.Tensor, ...]):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag.from_pretrained(t, False, mode="sum", sparse=True) for t in tables)
        self.register_buffer("lr", torch.zeros(()))
        self.weight = self.bags[0].weight

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        return torch.stack([bag(sparse[:, t : t + 1]) for t, bag in enumerate(self.bags)], 1)


class PeerTrainer(Trainer):
    """The same step with EmbeddingBags in place of the fused embedding."""

    def __init__(self, model: DLRM, precision: Precision):
        model.embedding = EmbeddingBags(model.embedding.tables())
        super().__init__(model, Schedule(0.1), precision)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)


def make_batches(sizes: tuple[int, ...], batch_size: int, device: torch.device) -> list[Batch]:
    """Random batches with ids by a power law, as popular as the synthetic days' values."""
    power = 1 - POPULARITY
    limits = torch.tensor(sizes)
    batches = []
    for _ in range(FRESH_BATCHES):
        uniform = torch.rand(batch_size, len(sizes), dtype=torch.float64)
        ranks = (((limits + 1.0) ** power - 1) * uniform + 1) ** (1 / power) - 1
        sparse = torch.minimum(ranks.long(), limits - 1).int()
        label = torch.randint(2, (batch_size,)).float()
        batches.append(Batch(torch.rand(batch_size, 13) * 5, sparse, label).to(device))
    return batches


def samples_per_second(trainer: Trainer, batches: list[Batch], seconds: float) -> tuple[float, float]:
    """Median samples/s of a step, and the spread (interquartile range over median)."""
    times = []
    stop = time.perf_counter() + seconds
    step = 0
    while time.perf_counter() < stop or len(times) < 5:
        start = time.perf_counter()
        trainer.step(batches[step % len(batches)]).item()
        if step >= 2:
            times.append(time.perf_counter() - start)
        step += 1
    low, middle, high = statistics.quantiles(times, n=4)
    return len(batches[0].label) / middle, (high - low) / middle


def matrix_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations/s of a large matrix product: the limit for the MLPs."""
    a = torch.rand(2048, 2048, device=device).to(dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times)


def mlp_operations(model: DLRM) -> int:
    """Operations of the MLPs for one sample, forward and backward (twice the forward)."""
    return 6 * sum(p.numel() for p in model.dense_parameters() if p.dim() == 2)


def measure(args: argparse.Namespace) -> dict:
    """Samples/s for float32 and bfloat16, with the peer's and the share of the matrix product limit."""
    device = choose_device(args.device)
    config, _ = read_config(args.model_config)
    measured = []
    for batch_size in args.batch_size:
        batches = make_batches(config.categorical_feature_sizes, batch_size, device)
        for name, precision in (("float32", Precision()), ("bfloat16", Precision(torch.bfloat16))):
            model = DLRM(config).to(device)
            ours, spread = samples_per_second(Trainer(model, Schedule(0.1), precision), batches, args.seconds)
            limit = matrix_flops(precision.autocast or torch.float32, device) / mlp_operations(model)
            peer, _ = samples_per_second(PeerTrainer(model, precision), batches, args.seconds)
            measured.append({
                "batch_size": batch_size, "precision": name,
                "samples_per_second": round(ours), "spread": round(spread, 3),
                "embedding_bag_samples_per_second": round(peer), "times_embedding_bag": round(ours / peer, 2),
                "share_of_matrix_limit": round(ours / limit, 3),
            })  # fmt: skip
            print(measured[-1], file=sys.stderr)
    return {"model_config": args.model_config, "device": str(device), "measured": measured}
