"""Embedding tables that take their own optimiser step inside backward, so that no gradient of a table ever exists.

Interface of every embedding module: forward(sparse int32 [B, T]) -> float32 [B, T, D]; in training, the rows looked up
take a step of `optimizer` (optimizers.py) with the sum of the gradients of all their look-ups during backward. The
learning rate is read from the scalar tensor `lr`, the number of the step (from 1) from `step`; gradients are divided by
`loss_scale` first.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from model.optimizers import Optimizer

DRAWN_AT_ONCE = 1 << 22  # numbers; another number would be other initial weights on a GPU

def initial_rows(size: int, dim: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows float32 [n, D]) of a new table's U(+-sqrt(1/size)), block by block: whoever holds a part of a
    table draws all of it in the same blocks and gets the same numbers. Valid until the next block."""
    bound, block = size**-0.5, max(1, DRAWN_AT_ONCE // dim)
    room = torch.empty(min(size, block), dim, device=device)
    for begin in range(0, size, block):
        yield begin, room[: size - begin].uniform_(-bound, bound)


class _Lookup(torch.autograd.Function):
    """weight [R, D], index int64 [N] -> rows [N, D]; backward lets the module update its weight in place."""

    @staticmethod
    def forward(ctx, weight, index, module):
        ctx.index, ctx.module = index, module
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, grad):
        ctx.module.update(ctx.index, grad)
        return None, None, None


class _Tables(nn.Module):
    """T tables stacked into one weight [sum of sizes, D], and the shift from ids to its rows. draw: False leaves the
    weight zero."""

    def __init__(
        self, sizes: tuple[int, ...], dim: int, hash_indices: bool, optimizer: Optimizer = Optimizer(),  # noqa: B008
        draw: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.optimizer, self._rule = optimizer, optimizer.table_rule()
        self.step, self.loss_scale = 0, 1.0
        self.sizes, self.dim, self.hash_indices = tuple(sizes), dim, hash_indices
        self.weight = nn.Parameter(torch.zeros(sum(sizes), dim))
        begins = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("begins", begins[:-1].clone(), persistent=False)
        self.register_buffer("limits", torch.tensor(sizes), persistent=False)
        self.register_buffer("lr", torch.zeros(()), persistent=False)
        for name, tensor in optimizer.table_state(sum(sizes), dim).items():
            self.register_buffer(f"state_{name}", tensor.to(self.weight.device), persistent=False)
        if draw:
            for table in self.tables():
                for begin, rows in initial_rows(len(table), dim, table.device):
                    table[begin : begin + len(rows)] = rows

    def tables(self) -> tuple[torch.Tensor, ...]:
        """Views [size, D] of the single tables."""
        return self.weight.detach().split(self.sizes)

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimiser remembers: tensors [R] or [R, D], by its names for them."""
        return {name.removeprefix("state_"): buffer for name, buffer in self.named_buffers() if name[:6] == "state_"}

    @torch.no_grad()
    def update(self, index: torch.Tensor, grad: torch.Tensor) -> None:
        """One optimiser step for the rows index int64 [N], of which grad float [N, D] are the gradients, times
        loss_scale."""
        if self.loss_scale != 1.0:
            grad = grad / self.loss_scale
        self._rule(self.weight, self.state(), index, grad, self.lr, self.step)

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
            return _Lookup.apply(self.weight, index, self).view(*sparse.shape, self.dim)
        return F.embedding(index, self.weight).view(*sparse.shape, self.dim)


class TorchEmbedding(_Tables):
    """The same through torch's own sparse gradients: slower, the specification of JointEmbedding."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self.weight.register_post_accumulate_grad_hook(self._step)

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        return F.embedding(self.rows(sparse), self.weight, sparse=True).view(*sparse.shape, self.dim)

    def _step(self, weight: torch.Tensor) -> None:
        gradient = weight.grad.coalesce()
        weight.grad = None
        self.update(gradient.indices()[0], gradient.values())
