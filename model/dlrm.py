"""The DLRM of Naumov et al. 2019 (arXiv:1906.00091), as MLPerf v0.7 trains it.

B batch, N dense features (13), T tables (26), D embedding dimension:

    dense  float32 [B, N] -> bottom MLP            -> bottom  [B, D]
    sparse int32   [B, T] -> embedding tables      -> vectors [B, T, D]
                             interaction of both   -> [B, W]
                             top MLP               -> logit float32 [B]
"""

import math

import torch
from torch import nn

from model.config import ModelConfig
from model.embedding import JointEmbedding, TorchEmbedding
from model.interaction import CatInteraction, DotInteraction


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
    """See the top of the file. `fused_embedding` off uses torch's own sparse gradients instead of the fused update."""

    def __init__(self, config: ModelConfig, fused_embedding: bool = True):
        super().__init__()
        self.config = config
        tables, dim = config.categorical_feature_sizes, config.embedding_dim
        self.bottom = mlp(config.num_numerical_features, config.bottom_mlp_sizes, last_relu=True)
        self.embedding = (JointEmbedding if fused_embedding else TorchEmbedding)(tables, dim, config.hash_indices)
        if config.interaction_op == "dot":
            self.interaction = DotInteraction(1 + len(tables), dim, config.self_interaction)
        else:
            self.interaction = CatInteraction(1 + len(tables), dim)
        self.top = mlp(self.interaction.width, config.top_mlp_sizes, last_relu=False)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """dense float32 [B, N] (logged), sparse int32 [B, T] -> logits float32 [B]."""
        bottom = self.bottom(dense)
        vectors = self.embedding(sparse).to(bottom.dtype)
        return self.top(self.interaction(bottom, vectors)).float().squeeze(1)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters of the MLPs: all that an optimiser outside has to update."""
        return [*self.bottom.parameters(), *self.top.parameters()]
