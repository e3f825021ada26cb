"""What others train embeddings with, each put into this project's DLRM: same MLPs, same interaction, same loss."""

import importlib.util

import torch
from torch import nn

from model.config import ModelConfig
from model.dlrm import DLRM
from model.layers.optimizers import Optimizer
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer

LR = 0.1
OURS, GRAPH = "ours", "ours, CUDA graph"


class EmbeddingBags(nn.Module):
    """The embedding of facebookresearch/dlrm: an EmbeddingBag a table, sparse gradients, torch's SGD."""

    optimizer = Optimizer()

    def __init__(self, tables: tuple[torch.Tensor, ...]):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag.from_pretrained(t, False, mode="sum", sparse=True) for t in tables)
        self.register_buffer("lr", torch.zeros((), device=tables[0].device))
        self.weight, self.step = self.bags[0].weight, 0

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        return torch.stack([bag(sparse[:, t : t + 1]) for t, bag in enumerate(self.bags)], 1)


class TableBatched(nn.Module):
    """FBGEMM's table-batched embeddings (TBE), SGD fused into backward, as torchrec trains DLRM.

    Starts with random tables of the sizes given, [sum of sizes, D] float32 in memory of its own.
    """

    optimizer = Optimizer()

    def __init__(self, sizes: tuple[int, ...], dim: int, device: torch.device):
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__()
        place = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
        kind = ComputeDevice.CUDA if device.type == "cuda" else ComputeDevice.CPU
        self.bags = SplitTableBatchedEmbeddingBagsCodegen(
            [(size, dim, place, kind) for size in sizes], optimizer=EmbOptimType.EXACT_SGD, learning_rate=LR,
            pooling_mode=PoolingMode.SUM, device=device,
        )  # fmt: skip
        self.bags.init_embedding_weights_uniform(-0.01, 0.01)
        self.dim = dim
        self.register_buffer("lr", torch.zeros((), device=device))
        self.weight, self.step = self.bags.split_embedding_weights()[0], 0

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        index = sparse.t().flatten().long()
        offsets = torch.arange(len(index) + 1, device=index.device)
        return self.bags(index, offsets).view(len(sparse), -1, self.dim)


def ours(config: ModelConfig, precision: Precision, device: torch.device) -> Trainer:
    """This project's step."""
    with device:
        return Trainer(DLRM(config), Schedule(LR), precision)


def _around(embedding: nn.Module, config: ModelConfig, precision: Precision, device: torch.device) -> Trainer:
    """The eager step of a DLRM with another embedding."""
    with device:
        model = DLRM(config.with_tables([1] * len(config.categorical_feature_sizes)))
    model.embedding = embedding
    return Trainer(model, Schedule(LR), precision)


def peers(mine: Trainer) -> dict[str, Trainer]:
    """Those that are installed, in trainers like `mine`. EmbeddingBag shares its tables, FBGEMM has its own."""
    config, precision, device = mine.model.config, mine.precision, mine.device
    bags = _around(EmbeddingBags(mine.model.embedding.tables()), config, precision, device)
    bags.optimizer = torch.optim.SGD(bags.model.parameters(), lr=0.0)
    found = {"EmbeddingBag": bags}
    if importlib.util.find_spec("fbgemm_gpu"):
        sizes, dim = config.categorical_feature_sizes, config.embedding_dim
        found["FBGEMM TBE"] = _around(TableBatched(sizes, dim, device), config, precision, device)
    return found
