"""How the bottom MLP's output and the embedding vectors meet."""

import torch
from torch import nn


class DotInteraction(nn.Module):
    """[bottom output, dot products of all pairs of vectors (lower triangle, row-major), one 0 of padding].

    The padding makes the width even, as in MLPerf v0.7. With `self_interaction` the diagonal is kept.
    """

    def __init__(self, vectors: int, dim: int, self_interaction: bool):
        super().__init__()
        rows, columns = torch.tril_indices(vectors, vectors, 0 if self_interaction else -1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.self_interaction, self.width = self_interaction, dim + len(self.pairs) + 1

    def forward(self, bottom: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """bottom [B, D] and vectors [B, T, D] of one dtype -> [B, D + pairs + 1]."""
        z = torch.cat([bottom.unsqueeze(1), vectors], 1)
        products = torch.bmm(z, z.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return torch.cat([bottom, products, bottom.new_zeros(bottom.shape[0], 1)], 1)


class CatInteraction(nn.Module):
    """[bottom output, all vectors] side by side."""

    def __init__(self, vectors: int, dim: int):
        super().__init__()
        self.width = vectors * dim

    def forward(self, bottom: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """bottom [B, D] and vectors [B, T, D] of one dtype -> [B, (T + 1) * D]."""
        return torch.cat([bottom, vectors.flatten(1)], 1)


class CrossInteraction(nn.Module):
    """Low-rank cross network, DCN-V2 (Wang et al. 2021, arXiv:2008.13535), as MLPerf v3 trains it (torchrec's
    LowRankCrossNet): x0 = [bottom output, all vectors]; x_{l+1} = x0 * (W_l (V_l x_l) + b_l) + x_l."""

    def __init__(self, vectors: int, dim: int, layers: int, rank: int):
        super().__init__()
        self.width = vectors * dim
        self.down = nn.ModuleList(nn.Linear(self.width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, self.width) for _ in range(layers))
        for linear in (*self.down, *self.up):
            nn.init.xavier_normal_(linear.weight)
        for linear in self.up:
            nn.init.zeros_(linear.bias)

    def forward(self, bottom: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """bottom [B, D] and vectors [B, T, D] of one dtype -> [B, (T + 1) * D]."""
        first = x = torch.cat([bottom, vectors.flatten(1)], 1)
        for down, up in zip(self.down, self.up, strict=True):
            x = first * up(down(x)) + x
        return x
