"""The Triton kernels of the training step at the size that they are for, on a GPU."""

import torch

from model.kernels import lookup_interaction, update
from model.layers.interaction import DotInteraction
from model.selfcheck.kernels import DEVICE, no_worse

CRITEO = (
    932209, 18814, 13624, 6862, 18488, 3, 6242, 1229, 49, 654428, 96850, 69004, 10, 2134, 7345, 60, 4, 918, 14, 984280,
    320932, 838408, 76380, 8906, 74, 33,
)  # fmt: skip


def real_sizes() -> None:
    """65,536 samples of 26 tables, dim 128, with more elements than 32 bits count where memory allows."""
    batch, dim, free = 65_536, 128, torch.cuda.mem_get_info()[0]
    factor = max(1.0, min(12.0, 0.5 * free / (sum(CRITEO) * dim * 4)))
    sizes = tuple(int(size * factor) if size > 1000 else size for size in CRITEO)
    begins, limits = torch.tensor([0, *sizes[:-1]]).cumsum(0).to(DEVICE), torch.tensor(sizes, device=DEVICE)
    weight = torch.randn(sum(sizes), dim, device=DEVICE)
    ids = (torch.rand(batch, 26, device=DEVICE).pow(4) * limits).int()
    ids[-64:] = (limits - 1).int()
    rows = ids.long() + begins
    bottom = torch.randn(batch, dim, device=DEVICE, dtype=torch.bfloat16)
    found_rows = lookup_interaction.find_rows(ids, begins, limits, False, len(weight))
    out = lookup_interaction.forward(bottom, found_rows, weight, False)
    grad = torch.randn_like(out)
    grad_bottom, grads = lookup_interaction.backward(grad, bottom, found_rows, weight, False)
    interaction = DotInteraction(27, dim, False).to(DEVICE)
    for part in (slice(0, 512), slice(batch - 512, batch)):
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            inputs = bottom[part], weight[rows[part]].bfloat16()
            first, vectors = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
            eager = interaction(first, vectors)
            eager.backward(grad[part].to(dtype))
            results.append((eager.detach(), first.grad, vectors.grad.flatten(0, 1)))
        found = out[part], grad_bottom[part], grads.view(batch, 26, dim)[part].flatten(0, 1)
        for ours, eager, truth in zip(found, *results, strict=True):
            no_worse(ours, eager, truth, part)
    distinct, place = rows.unique(return_inverse=True)
    before = weight[distinct].double()
    truth = before.index_add(0, place.flatten(), grads.double() / 8 * -0.1)
    eager = before.float().index_add(0, place.flatten(), grads.float() / 8 * -0.1)
    scalars = [torch.tensor(value, device=DEVICE) for value in (0.1, 8.0, 3)]
    update.update(weight, {}, found_rows.flatten(), grads, "sgd", 0.0, (0.9, 0.999), *scalars)
    no_worse(weight[distinct], eager, truth, "update")
