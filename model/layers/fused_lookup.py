"""Look-up and dot interaction as one autograd function over the Triton kernels: what the eager modules compute."""

import torch
from torch import nn

from model.layers.embedding import JointEmbedding, on_gpu
from model.layers.interaction import DotInteraction


def fusible(embedding: nn.Module, interaction: nn.Module, bottom: torch.Tensor) -> JointEmbedding | None:
    """The tables that lookup_dot takes for an embedding and an interaction: those of a JointEmbedding, or of another
    module that has all of them `whole`, here. None unless there are dot products, a GPU, and a shape that the kernels
    know."""
    # Not isinstance: an embedding that inherits from these has its own way of looking up.
    tables = embedding if type(embedding) is JointEmbedding else getattr(embedding, "whole", None)
    fits = (
        type(tables) is JointEmbedding and type(interaction) is DotInteraction
        and on_gpu(bottom) and tables.has_kernels and not torch.compiler.is_compiling()
    )  # fmt: skip
    return tables if fits else None


class _LookupDot(torch.autograd.Function):
    """Backward lets the embedding update its weight in place, after the last read of it."""

    @staticmethod
    def forward(ctx, bottom, weight, rows, embedding, self_interaction):
        from model.kernels import lookup_interaction

        found = embedding.source(rows)
        ctx.save_for_backward(bottom, rows, found.places)
        ctx.found, ctx.embedding, ctx.self_interaction = found, embedding, self_interaction
        return lookup_interaction.forward(bottom, found.places, found.weight, self_interaction)

    @staticmethod
    def backward(ctx, grad):
        from model.kernels import lookup_interaction

        bottom, rows, places = ctx.saved_tensors
        found, flag = ctx.found, ctx.embedding.flag
        grad_bottom, grads = lookup_interaction.backward(grad, bottom, places, found.weight, ctx.self_interaction, flag)
        ctx.embedding.update(rows.flatten(), grads, order=found.order, checked=flag is not None)
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
