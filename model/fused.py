"""Look-up and dot interaction as one autograd function over the Triton kernels: what the eager modules compute."""

import torch
from torch import nn

from model.embedding import JointEmbedding, on_gpu
from model.interaction import DotInteraction


def fuses(embedding: nn.Module, interaction: nn.Module, bottom: torch.Tensor) -> bool:
    """Whether lookup_dot takes these: a local JointEmbedding, dot products, a GPU, a shape that the kernels know."""
    # Not isinstance: an embedding that inherits from these has its own way of looking up.
    return (
        type(embedding) is JointEmbedding and type(interaction) is DotInteraction
        and on_gpu(bottom) and embedding.has_kernels and not torch.compiler.is_compiling()
    )  # fmt: skip


class _LookupDot(torch.autograd.Function):
    """Backward lets the embedding update its weight in place, after the last read of it."""

    @staticmethod
    def forward(ctx, bottom, weight, sparse, embedding, self_interaction):
        out, rows, source, index = _forward(bottom, sparse, embedding, self_interaction, keep_rows=True)
        ctx.save_for_backward(bottom, rows, index)
        ctx.source, ctx.embedding, ctx.self_interaction = source, embedding, self_interaction
        return out

    @staticmethod
    def backward(ctx, grad):
        from model.kernels import lookup_interaction

        bottom, rows, index = ctx.saved_tensors
        grad_bottom, grads = lookup_interaction.backward(grad, bottom, rows, ctx.source, ctx.self_interaction)
        ctx.embedding.update(index.flatten(), grads)
        return grad_bottom, None, None, None, None


def _forward(bottom, sparse, embedding, self_interaction, keep_rows):
    """Output; rows of `source` that were looked up; source: the weight, or the part of it that is on the device for
    this batch; the same rows as rows of the weight."""
    from model.kernels import lookup_interaction

    source, begins, hashed = embedding.weight.detach(), embedding.begins, embedding.hash_indices
    index = None
    if embedding.staged:
        index = embedding.rows(sparse)
        source, slots = embedding.stage(index)
        sparse, begins, hashed = slots.view(sparse.shape), torch.zeros_like(begins), False
    out, rows = lookup_interaction.forward(
        bottom, sparse.contiguous(), source, begins, embedding.limits, hashed, self_interaction, keep_rows
    )
    return out, rows, source, rows if index is None else index


def lookup_dot(
    bottom: torch.Tensor, sparse: torch.Tensor, embedding: JointEmbedding, interaction: DotInteraction
) -> torch.Tensor:
    """interaction(bottom, embedding(sparse)) for bottom [B, D] and sparse int32 [B, T] -> [B, W], in bottom's type.

    Gradients as the eager modules give them, up to rounding: the products' gradients are summed in float32.
    """
    if torch.is_grad_enabled():
        return _LookupDot.apply(bottom, embedding.weight, sparse, embedding, interaction.self_interaction)
    return _forward(bottom, sparse, embedding, interaction.self_interaction, keep_rows=False)[0]
