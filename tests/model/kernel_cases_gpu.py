"""Cases of test_kernels.py that need a GPU, each run in a process of its own: a CUDA graph, and real sizes.

python -m tests.model.kernel_cases_gpu graph
"""

import sys

import torch

from model.layers import fused_lookup as fused
from model.layers.embedding import JointEmbedding, Storage
from model.layers.interaction import DotInteraction
from model.layers.optimizers import Optimizer
from model.selfcheck.kernels import DEVICE, make_ids
from model.selfcheck.real_sizes import CRITEO, real_sizes


def graph() -> None:
    """Look-up, interaction and update inside a CUDA graph, with a learning rate that changes in between."""
    sizes, dim, batch = CRITEO, 64, 2048
    with DEVICE:
        twins = [JointEmbedding(sizes, dim, False, Optimizer("rowwise_adagrad"), Storage(torch.bfloat16)) for _ in "ab"]
        twins[1].weight.data.copy_(twins[0].weight.data)
        interaction = DotInteraction(27, dim, False)
    ids, bottom = make_ids(sizes, batch, "random"), torch.randn(batch, dim, device=DEVICE, dtype=torch.bfloat16)
    bottom.requires_grad_()

    def step(tables) -> None:
        loss = fused.lookup_dot(bottom, ids, tables, interaction).float().square().mean()
        torch.autograd.grad(loss, bottom)  # the tables step on the way

    for tables in twins:  # kernels are compiled; with lr 0 and a huge scale nothing else happens
        tables.loss_scale = 1e30
        step(tables)
    before, captured = twins[0].weight.detach().clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step(twins[0])
    for number in range(1, 6):
        ids.copy_(make_ids(sizes, batch, "random"))
        for tables in twins:
            tables.lr.fill_(0.3 / number)
            tables.step, tables.loss_scale = number, 2.0**number
        captured.replay()
        step(twins[1])
    assert torch.equal(twins[0].weight, twins[1].weight) and not torch.equal(twins[0].weight, before)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"graph": graph, "real_sizes": real_sizes}[sys.argv[1]]()
    print("agrees")
