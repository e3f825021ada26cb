"""The DLRM of Naumov et al. 2019 (arXiv:1906.00091), as MLPerf v0.7 trains it.

B batch, N dense features (13), T tables (26), D embedding dimension:

    dense  float32 [B, N] -> bottom MLP            -> bottom  [B, D]
    sparse int32   [B, T] -> embedding tables      -> vectors [B, T, D]
                             interaction of both   -> [B, W]
                             top MLP               -> logit float32 [B]
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from model.config import ModelConfig
from model.layers.embedding import JointEmbedding, Storage, TorchEmbedding
from model.layers.fused_lookup import fusible, lookup_dot
from model.layers.interaction import CatInteraction, CrossInteraction, DotInteraction
from model.layers.optimizers import Optimizer


def mlp(inputs: int, sizes: tuple[int, ...], last_relu: bool) -> nn.Sequential:
    """Linear layers with ReLU between (and after, with `last_relu`); W ~ N(0, sqrt(2/(in+out))), b ~ N(0, sqrt(1/out)),
    where the second number is the standard deviation."""
    layers: list[nn.Module] = []
    for size in sizes:
        linear = nn.Linear(inputs, size)
        nn.init.normal_(linear.weight, 0.0, math.sqrt(2 / (inputs + size)))
        nn.init.normal_(linear.bias, 0.0, math.sqrt(1 / size))
        layers += [linear, nn.ReLU()]
        inputs = size
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


class DLRM(nn.Module):
    """See the top of the file. fused_embedding: False uses torch's own sparse gradients instead of the fused update;
    table_optimizer, storage: of the tables; make_embedding: makes another module with their interface instead,
    called where the tables would be made (the order of random numbers is part of the initial weights)."""

    def __init__(
        self, config: ModelConfig, fused_embedding: bool = True, table_optimizer: Optimizer = Optimizer(),  # noqa: B008
        storage: Storage = Storage(), make_embedding: Callable[[], nn.Module] | None = None,  # noqa: B008
    ):  # fmt: skip
        super().__init__()
        self.config = config
        tables, dim = config.categorical_feature_sizes, config.embedding_dim
        self.bottom = mlp(config.num_numerical_features, config.bottom_mlp_sizes, last_relu=True)
        embedding = JointEmbedding if fused_embedding else TorchEmbedding
        self.embedding = (
            make_embedding() if make_embedding
            else embedding(tables, dim, config.hash_indices, table_optimizer, storage)
        )  # fmt: skip
        vectors = 1 + len(tables)
        self.interaction = {
            "dot": lambda: DotInteraction(vectors, dim, config.self_interaction),
            "cat": lambda: CatInteraction(vectors, dim),
            "dcnv2": lambda: CrossInteraction(vectors, dim, config.dcn_num_layers, config.dcn_low_rank_dim),
        }[config.interaction_op]()
        self.top = mlp(self.interaction.width, config.top_mlp_sizes, last_relu=False)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense float32 [B, N] (logged), sparse int32 [B, T] -> logits float32 [B]."""
        bottom = self.bottom(dense)
        tables = fusible(self.embedding, self.interaction, bottom)
        if tables is not None:
            ids = sparse if tables is self.embedding else self.embedding.local_ids(sparse)
            features = lookup_dot(bottom, ids, tables, self.interaction)
        else:
            features = self.interaction(bottom, self.embedding(sparse).to(bottom.dtype))
        return self.top(features).float().squeeze(1)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters of the MLPs and the interaction: all that an optimiser outside has to update."""
        return [*self.bottom.parameters(), *self.interaction.parameters(), *self.top.parameters()]
