"""Gradients of what every rank holds, summed over the ranks while backward still runs."""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import Variable

from model.distributed.process_group import Ranks

BUCKET_BYTES = 4 << 20


class GradientReducer:
    """Sums the gradients of `parameters` over all ranks: when backward returns, each rank has the sum.

    Gradients are collected in flat float32 buckets in the order in which backward makes them (the reverse of the
    parameters'), and a bucket leaves as soon as it is full. A parameter's .grad becomes its part of the bucket.
    Anything else can join by reduce().
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._open: list[tuple[object, Callable[[], None]]] = []
        self._queued = False

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Take care of these parameters from now on."""
        bucket: list[nn.Parameter] = []
        for parameter in reversed(parameters):
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) * 4 >= BUCKET_BYTES:
                self._make(bucket)
                bucket = []
        if bucket:
            self._make(bucket)

    def _make(self, parameters: list[nn.Parameter]) -> None:
        flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        views = [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters,
                                                       strict=True)]  # fmt: skip
        missing = len(parameters)

        def arrived(view: torch.Tensor, parameter: nn.Parameter) -> None:
            nonlocal missing
            view.copy_(parameter.grad)
            parameter.grad = view
            missing -= 1
            if not missing:
                missing = len(parameters)
                self.reduce(flat)

        for view, parameter in zip(views, parameters, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda p, view=view: arrived(view, p))

    def reduce(self, tensor: torch.Tensor, then: Callable[[], None] = lambda: None) -> None:
        """Within backward: start the sum of a tensor over all ranks, in place; then() runs when backward ends."""
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._finish)
        self._open.append((self._ranks.all_reduce(tensor, wait=False), then))

    def _finish(self) -> None:
        self._queued = False
        found, self._open = self._open, []
        for work, then in found:
            work.wait()
            then()
