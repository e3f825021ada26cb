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
    def forward(ctx, bottom, weight, rows, embedding, self_interaction):
        from model.kernels import lookup_interaction

        source, places = embedding.source(rows)
        ctx.save_for_backward(bottom, rows, places)
        ctx.source, ctx.embedding, ctx.self_interaction = source, embedding, self_interaction
        return lookup_interaction.forward(bottom, places, source, self_interaction)

    @staticmethod
    def backward(ctx, grad):
        from model.kernels import lookup_interaction

        bottom, rows, places = ctx.saved_tensors
        grad_bottom, grads = lookup_interaction.backward(grad, bottom, places, ctx.source, ctx.self_interaction)
        ctx.embedding.update(rows.flatten(), grads)
        return grad_bottom, None, None, None, None


def lookup_dot(
    bottom: torch.Tensor, sparse: torch.Tensor, embedding: JointEmbedding, interaction: DotInteraction
) -> torch.Tensor:
    """interaction(bottom, embedding(sparse)) for bottom [B, D] and sparse int32 [B, T] -> [B, W], in bottom's type.

    Gradients as the eager modules give them, up to rounding: the products' gradients are summed in float32.
    """
    from model.kernels import lookup_interaction

    rows = lookup_interaction.find_rows(
        sparse.contiguous(), embedding.begins, embedding.limits, embedding.hash_indices, len(embedding.weight)
    )
    return _LookupDot.apply(bottom, embedding.weight, rows, embedding, interaction.self_interaction)
