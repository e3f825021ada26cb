"""Optimisers: for the tables, a rule that updates only the rows of a batch, inside backward; for the MLPs, torch's own.

A row that a batch shows many times takes one step with the sum of its gradients, as it would in a dense optimiser.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

NAMES = ("sgd", "rowwise_adagrad", "adagrad", "adam")
EPS = {"sgd": 0.0, "rowwise_adagrad": 1e-8, "adagrad": 1e-10, "adam": 1e-8}  # torch's and FBGEMM's defaults
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Optimizer:
    """name: one of NAMES; eps: None for the name's usual one; betas: of Adam."""

    name: str = "sgd"
    eps: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    @property
    def epsilon(self) -> float:
        """What is added to the root that a step is divided by."""
        return EPS[self.name] if self.eps is None else self.eps

    def table_state(self, rows: int, dim: int) -> State:
        """What the rule remembers of a joint table [rows, dim]; zeros, float32."""
        shapes = {
            "sgd": {}, "rowwise_adagrad": {"sum": (rows,)}, "adagrad": {"sum": (rows, dim)},
            "adam": {"exp_avg": (rows, dim), "exp_avg_sq": (rows, dim)},
        }  # fmt: skip
        return {name: torch.zeros(shape) for name, shape in shapes[self.name].items()}

    def table_rule(
        self, stochastic: bool = True
    ) -> Callable[[torch.Tensor, State, torch.Tensor, torch.Tensor, torch.Tensor, int], None]:
        """rule(weight [R, D], state, index int64 [N], grad [N, D], lr scalar, step from 1: int or scalar), in place.

        stochastic: how a bfloat16 or float16 weight is rounded; False: to nearest.
        """
        rules = {"sgd": _sgd, "rowwise_adagrad": _adagrad, "adagrad": _adagrad, "adam": _adam}
        return rules[self.name](self, stochastic)

    def for_mlps(self, parameters: list[nn.Parameter], fused: bool = False) -> torch.optim.Optimizer:
        """torch's optimiser of that name; row-wise Adagrad becomes Adagrad, as MLPs have no rows.

        fused: as one kernel, which can skip a step and takes its learning rate from a GPU without waiting. Adam and
        Adagrad always are: on a CPU that takes half the time of torch's loops, while SGD takes longer. Where torch has
        no such kernel of Adagrad for a GPU, it is DeviceAdagrad.
        """
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=0.0, fused=fused)
        if self.name == "adam":
            return torch.optim.Adam(parameters, lr=0.0, betas=self.betas, eps=self.epsilon, fused=True)
        if all(has_fused_adagrad(device) for device in {parameter.device for parameter in parameters}):
            return torch.optim.Adagrad(parameters, lr=0.0, eps=self.epsilon, fused=True)
        return DeviceAdagrad(parameters, lr=0.0, eps=self.epsilon, foreach=True)


def takes_lr_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser of MLPs on a GPU reads a learning rate there; others would wait for it, once a parameter."""
    return isinstance(optimizer, DeviceAdagrad) or bool(optimizer.defaults.get("fused"))


def has_fused_adagrad(device: torch.device) -> bool:
    """Whether torch's Adagrad takes a step as one kernel there, with its learning rate on the device: tried, since it
    is the first step that says no (torch 2.11 on a GPU)."""
    one = nn.Parameter(torch.zeros(1, device=device))
    one.grad = torch.zeros_like(one)
    optimizer = torch.optim.Adagrad([one], lr=0.0, fused=True)
    if device.type != "cuda":
        return True
    optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a version that waits for the learning rate has no use
    try:
        optimizer.step()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True


class DeviceAdagrad(torch.optim.Adagrad):
    """Adagrad by torch's foreach kernels, with the learning rate, and `found_inf` (where it is set: above 0, nothing
    changes), read from scalars on the device. The state is torch's; its count of steps, of no use here, stays 0."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            sums = [self.state[parameter]["sum"] for parameter in parameters]
            if getattr(self, "found_inf", None) is not None:
                skip = self.found_inf > 0
                gradients = [gradient.masked_fill(skip, 0.0) for gradient in gradients]
            torch._foreach_addcmul_(sums, gradients, gradients)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            changes = torch._foreach_div(gradients, roots)
            torch._foreach_mul_(changes, group["lr"])
            torch._foreach_sub_(parameters, changes)


def _summed(index: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows int64 [U] of index [N], and the sums [U, D] of their gradients [N, D]."""
    rows, place = index.unique(return_inverse=True)
    return rows, add_rows_(grad.new_zeros(len(rows), grad.shape[1]), place, grad)


def add_rows_(rows: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """rows [R, D] += values [N, D] at index int64 [N], in an order that depends on the index alone, so that equal input
    gives equal bits. On a GPU index_add_ adds in the order of arrival; index_put_ sorts."""
    if rows.is_cuda:
        return rows.index_put_((index,), values, accumulate=True)
    return rows.index_add_(0, index, values)


def stochastically_rounded(values: torch.Tensor, dtype: torch.dtype, seed: int | torch.Tensor) -> torch.Tensor:
    """float32 values as bfloat16 or float16: one of the two neighbours, each the likelier the nearer it is, so that a
    sum of many changes that are too small for a digit of the weight is right on average. Equal seeds, equal bits."""
    mantissa, least = {torch.bfloat16: (7, 2.0**-126), torch.float16: (10, 2.0**-24)}[dtype]
    digits = 23 - mantissa
    power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    spacing = (power * 2.0**-mantissa).clamp_(min=least)
    generator = torch.Generator(values.device).manual_seed(int(seed))
    random = torch.randint(1 << digits, values.shape, generator=generator, dtype=torch.float32, device=values.device)
    return (values / spacing).add_(random, alpha=2.0**-digits).floor_().mul_(spacing).to(dtype)


def _change(weight: torch.Tensor, rows: torch.Tensor, change: torch.Tensor, seed: int | None) -> None:
    """weight[rows] += change, for distinct rows; seed: of stochastic rounding, None for rounding to nearest."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        weight.index_add_(0, rows, change)
        return
    new = weight[rows].float().add_(change)
    weight[rows] = new.to(weight.dtype) if seed is None else stochastically_rounded(new, weight.dtype, seed)


def _sgd(_: Optimizer, stochastic: bool):
    def rule(weight, state, index, grad, lr, step):
        if weight.dtype in (torch.bfloat16, torch.float16):
            rows, total = _summed(index, grad)
            _change(weight, rows, total * -lr, step if stochastic else None)
        else:
            add_rows_(weight, index, grad * -lr)

    return rule


def _adagrad(settings: Optimizer, stochastic: bool):
    """Duchi, Hazan, Singer 2011; row-wise, a row has one sum: that of its gradients' mean squares (FBGEMM's
    EXACT_ROWWISE_ADAGRAD)."""

    def rule(weight, state, index, grad, lr, step):
        rows, total = _summed(index, grad)
        squares = total.square()
        if settings.name == "rowwise_adagrad":
            squares = squares.mean(1)
        squares += state["sum"][rows]
        state["sum"][rows] = squares
        scale = -lr / (squares.sqrt_() + settings.epsilon)
        change = total * (scale.unsqueeze(1) if scale.dim() == 1 else scale)
        _change(weight, rows, change, step if stochastic else None)

    return rule


def _adam(settings: Optimizer, stochastic: bool):
    """Kingma, Ba 2015, on the rows of the batch only, as torch.optim.SparseAdam."""
    beta1, beta2 = settings.betas

    def rule(weight, state, index, grad, lr, step):
        rows, total = _summed(index, grad)
        first = state["exp_avg"][rows].lerp_(total, 1 - beta1)
        second = state["exp_avg_sq"][rows].lerp_(total.square(), 1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = first, second
        number = int(step)  # in float64: 1 - 0.999 has no digits to spare
        scale = -lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
        change = scale * first / (second.sqrt_() + settings.epsilon)
        _change(weight, rows, change, step if stochastic else None)

    return rule
