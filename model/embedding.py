"""Embedding tables that take their own SGD step inside backward, so that no gradient of a table ever exists.

Interface of every embedding module: forward(sparse int32 [B, T]) -> float32 [B, T, D]; in training, the rows looked up
take the step `row -= lr * (sum of the gradients of all its look-ups)` during backward, with `lr` read from the scalar
tensor of that name. That is exact SGD, also where a row occurs many times in a batch.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _Lookup(torch.autograd.Function):
    """weight [R, D], index int64 [N] -> rows [N, D]; backward updates weight in place."""

    @staticmethod
    def forward(ctx, weight, index, lr):
        ctx.weight, ctx.index, ctx.lr = weight, index, lr
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            ctx.weight.index_add_(0, ctx.index, grad * -ctx.lr)
        return None, None, None


class _Tables(nn.Module):
    """T tables stacked into one weight [sum of sizes, D], and the shift from ids to its rows."""

    def __init__(self, sizes: tuple[int, ...], dim: int, hash_indices: bool):
        super().__init__()
        self.sizes, self.dim, self.hash_indices = tuple(sizes), dim, hash_indices
        self.weight = nn.Parameter(torch.empty(sum(sizes), dim))
        begins = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("begins", begins[:-1].clone(), persistent=False)
        self.register_buffer("limits", torch.tensor(sizes), persistent=False)
        self.register_buffer("lr", torch.zeros(()), persistent=False)
        with torch.no_grad():
            for table in self.tables():
                bound = len(table) ** -0.5
                table.uniform_(-bound, bound)

    def tables(self) -> tuple[torch.Tensor, ...]:
        """Views [size, D] of the single tables."""
        return self.weight.detach().split(self.sizes)

    def rows(self, sparse: torch.Tensor) -> torch.Tensor:
        """Rows of the joint weight, int64 [B * T], for ids int32 [B, T]."""
        ids = sparse.long()
        if self.hash_indices:
            ids = ids % self.limits
        return (ids + self.begins).flatten()


class JointEmbedding(_Tables):
    """The tables with the update fused into backward."""

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        index = self.rows(sparse)
        if torch.is_grad_enabled():
            return _Lookup.apply(self.weight, index, self.lr).view(*sparse.shape, self.dim)
        return F.embedding(index, self.weight).view(*sparse.shape, self.dim)


class TorchEmbedding(_Tables):
    """The same through torch's own sparse gradients: slower, the specification of JointEmbedding."""

    def __init__(self, sizes: tuple[int, ...], dim: int, hash_indices: bool):
        super().__init__(sizes, dim, hash_indices)
        self.weight.register_post_accumulate_grad_hook(self._step)

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        return F.embedding(self.rows(sparse), self.weight, sparse=True).view(*sparse.shape, self.dim)

    def _step(self, weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight.add_(weight.grad.coalesce() * -self.lr)
        weight.grad = None
