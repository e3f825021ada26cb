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
        out, rows = _forward(bottom, sparse, embedding, self_interaction, keep_rows=True)
        ctx.save_for_backward(bottom, rows)
        ctx.embedding, ctx.self_interaction = embedding, self_interaction
        return out

    @staticmethod
    def backward(ctx, grad):
        from model.kernels import lookup_interaction

        (bottom, rows), embedding = ctx.saved_tensors, ctx.embedding
        grad_bottom, grads = lookup_interaction.backward(
            grad, bottom, rows, embedding.weight.detach(), ctx.self_interaction
        )
        embedding.update(rows.flatten(), grads)
        return grad_bottom, None, None, None, None


def _forward(bottom, sparse, embedding, self_interaction, keep_rows):
    from model.kernels import lookup_interaction

    return lookup_interaction.forward(
        bottom, sparse.contiguous(), embedding.weight.detach(), embedding.begins, embedding.limits,
        embedding.hash_indices, self_interaction, keep_rows,
    )  # fmt: skip


def lookup_dot(
    bottom: torch.Tensor, sparse: torch.Tensor, embedding: JointEmbedding, interaction: DotInteraction
) -> torch.Tensor:
    """interaction(bottom, embedding(sparse)) for bottom [B, D] and sparse int32 [B, T] -> [B, W], in bottom's type.

    Gradients as the eager modules give them, up to rounding: the products' gradients are summed in float32.
    """
    if torch.is_grad_enabled():
        return _LookupDot.apply(bottom, embedding.weight, sparse, embedding, interaction.self_interaction)
    return _forward(bottom, sparse, embedding, interaction.self_interaction, keep_rows=False)[0]
