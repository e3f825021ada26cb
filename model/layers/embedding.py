"""Embedding tables that take their own optimiser step inside backward, so that no gradient of a table ever exists.

Interface of every embedding module: forward(sparse int32 [B, T]) -> float32 [B, T, D]; in training, the rows looked up
take a step of `optimizer` (optimizers.py) with the sum of the gradients of all their look-ups during backward. The
learning rate is read from the scalar tensor `lr`, the number of the step (from 1) from `step`; gradients are divided by
`loss_scale` first. These two are set to a number, or once and for all to a scalar tensor. On a GPU all three are read
from device memory, so that a CUDA graph sees what was set before its replay (set numbers outside of the graph).
After hold(), backward takes no step, but keeps what it needs: held() gives the gradients, release(skip) takes the
steps, once it is known whether all gradients are good. Gradients that a kernel has looked at on its way are not given.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import kernels
from model.config import ConfigError
from model.layers.optimizers import Optimizer

PLACEMENTS = ("device", "host")
DRAWN_AT_ONCE = 1 << 22  # numbers; another number would be other initial weights on a GPU
Order = tuple[torch.Tensor, torch.Tensor]  # look-ups sorted by row: keys [N], and their places int64 [N]


@dataclass(frozen=True)
class Storage:
    """How tables are kept. dtype: float32, bfloat16 or float16; half types are rounded stochastically after a step, or
    to nearest without `stochastic`. placement: "device", or "host": memory of the host, which a GPU reads and writes
    in place, over its bus, so that tables larger than its memory can be trained, slower."""

    dtype: torch.dtype = torch.float32
    stochastic: bool = True
    placement: str = "device"


class Found(NamedTuple):
    """Where look-ups find their rows: a weight on the device, places in it, int; order: what sorting the look-ups gave,
    where that was needed."""

    weight: torch.Tensor
    places: torch.Tensor
    order: Order | None = None


class Held(NamedTuple):
    """A step not taken yet, as update() was asked for it."""

    index: torch.Tensor
    grad: torch.Tensor
    order: Order | None
    checked: bool


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels work on this tensor."""
    return tensor.is_cuda


def _pinned(weight: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """The same tensor, its memory opened to the GPU where it lies, as long as the owner lives. Raises ConfigError.

    Not torch's pin_memory(): its allocator rounds up to a power of two.
    """
    status = torch.cuda.cudart().cudaHostRegister(weight.data_ptr(), weight.numel() * weight.element_size(), 0)
    if int(status):
        raise ConfigError(
            f"--table_placement host: {weight.numel() * weight.element_size():,} bytes of host memory could not be "
            f"pinned (CUDA error {int(status)}); check `ulimit -l` and free memory, or take smaller tables"
        )
    weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, weight.data_ptr()).atexit = False
    return weight


def check_ids(ids: torch.Tensor, limits: torch.Tensor) -> None:
    """Raise ConfigError where one of ids int [B, T] is not from 0 to below its column's limit int [T]."""
    wrong = (ids < 0) | (ids >= limits)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ConfigError(
            f"row {row + 1} of a batch, table {column}: expected an id from 0 to {int(limits[column]) - 1}, got "
            f"{int(ids[row, column])}; the data set is not that of this model"
        )


def _scalar(buffer: torch.Tensor, value: float | torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the buffer with the number in it."""
    return value if isinstance(value, torch.Tensor) else buffer.fill_(value)


def initial_rows(size: int, dim: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows float32 [n, D]) of a new table's U(+-sqrt(1/size)), block by block: whoever holds a part of a
    table draws all of it in the same blocks and gets the same numbers. Valid until the next block."""
    bound, block = size**-0.5, max(1, DRAWN_AT_ONCE // dim)
    room = torch.empty(min(size, block), dim, device=device)
    for begin in range(0, size, block):
        yield begin, room[: size - begin].uniform_(-bound, bound)


class _Lookup(torch.autograd.Function):
    """weight [R, D], index int64 [N] -> rows float32 [N, D]; backward lets the module update its weight in place."""

    @staticmethod
    def forward(ctx, weight, index, module):
        found = module.source(index)
        ctx.index, ctx.module, ctx.order = index, module, found.order
        return module.vectors(found)

    @staticmethod
    def backward(ctx, grad):
        ctx.module.update(ctx.index, grad, order=ctx.order)
        return None, None, None


class _Tables(nn.Module):
    """T tables stacked into one weight [sum of sizes, D], and the shift from ids to its rows. draw: False leaves the
    weight zero."""

    def __init__(
        self, sizes: tuple[int, ...], dim: int, hash_indices: bool, optimizer: Optimizer = Optimizer(),  # noqa: B008
        storage: Storage = Storage(), draw: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.optimizer, self.storage = optimizer, storage
        self._rule = optimizer.table_rule(storage.stochastic)
        self._waiting: list[Held] | None = None
        self.flag: torch.Tensor | None = None
        self.sizes, self.dim, self.hash_indices = tuple(sizes), dim, hash_indices
        begins = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("begins", begins[:-1].clone(), persistent=False)
        self.register_buffer("limits", torch.tensor(sizes), persistent=False)
        self.register_buffer("lr", torch.zeros(()), persistent=False)
        self.register_buffer("_step_scalar", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("_scale_scalar", torch.ones(()), persistent=False)
        self.step, self.loss_scale = 0, 1.0
        self.weight = nn.Parameter(self._new_weight())
        for name, tensor in optimizer.table_state(sum(sizes), dim).items():
            self.register_buffer(f"state_{name}", tensor.to(self.lr.device), persistent=False)
        if draw:
            self._draw()

    def _new_weight(self) -> torch.Tensor:
        shape, dtype = (sum(self.sizes), self.dim), self.storage.dtype
        if self.storage.placement == "device":
            return torch.zeros(shape, dtype=dtype)
        weight = torch.zeros(shape, dtype=dtype, device="cpu")
        if not on_gpu(self.lr):
            return weight
        if not self.has_kernels:
            raise ConfigError(
                "--table_placement host: expected an embedding_dim that is a multiple of 8, up to "
                f"{kernels.MOST_COLUMNS}, and up to {kernels.MOST_TABLES} tables; got {self.dim} and {len(self.sizes)}"
            )
        return _pinned(weight, self)

    @torch.no_grad()
    def _draw(self) -> None:
        """Initial weights; the same numbers, rounded, for half types, and for tables in host memory."""
        for table in self.tables():
            for begin, rows in initial_rows(len(table), self.dim, self.lr.device):
                table[begin : begin + len(rows)] = rows

    @property
    def step(self) -> int | torch.Tensor:
        """Number of the step, from 1: a number, or a scalar on the device."""
        return self._step

    @step.setter
    def step(self, number: int | torch.Tensor) -> None:
        self._step, self._step_scalar = number, _scalar(self._step_scalar, number)

    @property
    def loss_scale(self) -> float | torch.Tensor:
        """What gradients are divided by: a number, or a float32 scalar on the device."""
        return self._scale

    @loss_scale.setter
    def loss_scale(self, scale: float | torch.Tensor) -> None:
        self._scale, self._scale_scalar = scale, _scalar(self._scale_scalar, scale)

    @property
    def has_kernels(self) -> bool:
        """Whether the Triton kernels know this shape."""
        return kernels.supported(len(self.sizes), self.dim)

    def tables(self) -> tuple[torch.Tensor, ...]:
        """Views [size, D] of the single tables."""
        return self.weight.detach().split(self.sizes)

    def state(self) -> dict[str, torch.Tensor]:
        """What the optimiser remembers: tensors [R] or [R, D], by its names for them."""
        return {name.removeprefix("state_"): buffer for name, buffer in self.named_buffers() if name[:6] == "state_"}

    @torch.no_grad()
    def update(
        self, index: torch.Tensor, grad: torch.Tensor, *, skip: torch.Tensor | None = None,
        order: Order | None = None, checked: bool = False,
    ) -> None:  # fmt: skip
        """One optimiser step for the rows index int64 [N], of which grad float [N, D] are the gradients, times
        loss_scale; after hold(), a note of it. skip: a float32 scalar on the device; above 0, nothing changes. order:
        what sort_lookups made of the index, if that is known already; checked: whether `flag` tells already of
        gradients that are no numbers."""
        if self._waiting is not None:
            self._waiting.append(Held(index, grad, order, checked))
        else:
            self._take_step(index, grad, order, skip)

    def _take_step(
        self, index: torch.Tensor, grad: torch.Tensor, order: Order | None, skip: torch.Tensor | None
    ) -> None:
        grad = grad.to(self.lr.dtype)
        if skip is not None and grad.is_cuda and self.optimizer.name == "sgd" and self.weight.dtype == torch.float32:
            grad = grad.masked_fill(skip > 0, 0.0)  # nothing changes, and the host waits for nothing
        elif skip is not None and skip > 0:
            return
        if isinstance(self.loss_scale, torch.Tensor) or self.loss_scale != 1.0:
            grad = grad / self.loss_scale
        self._rule(self.weight, self.state(), index, grad, self.lr, self.step)

    def source(self, rows: torch.Tensor) -> Found:
        """Where rows int [...] of the joint weight are found."""
        return Found(self.weight.detach(), rows)

    def vectors(self, found: Found) -> torch.Tensor:
        """The rows found, float32 [..., D]."""
        return F.embedding(found.places, found.weight).to(self.lr.dtype)

    def hold(self, flag: torch.Tensor | None = None) -> None:
        """From now on, take no step in backward. flag: a float32 scalar on the device, which backward sets to 1 where a
        kernel that makes gradients meets one that is infinite or no number."""
        self._waiting, self.flag = [], flag

    def held(self) -> list[torch.Tensor]:
        """The gradients of the steps not taken yet that no kernel has looked at, still times loss_scale."""
        return [held.grad for held in self._waiting or () if not held.checked]

    @torch.no_grad()
    def release(self, skip: torch.Tensor) -> None:
        """Take the steps, unless `skip`, a scalar on the device, is above 0; and hold those of the next backward."""
        for held in self._waiting:
            self._take_step(held.index, held.grad, held.order, skip)
        self.hold(self.flag)

    def rows(self, sparse: torch.Tensor) -> torch.Tensor:
        """Rows of the joint weight, int64 [B * T], for ids int32 [B, T]."""
        ids = sparse.long()
        if self.hash_indices:
            ids = ids % self.limits
        elif not (on_gpu(ids) or torch.compiler.is_compiling()):  # there, loaders (DeviceBounds) and Scorer look
            check_ids(ids, self.limits)
        return (ids + self.begins).flatten()


class JointEmbedding(_Tables):
    """The tables with the update fused into backward; on a GPU by the kernels of model/kernels, where they know the
    shape. Equal input gives equal bits, on a CPU with equally many threads, on a GPU with the kernels and without."""

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        index = self.rows(sparse)
        if torch.is_grad_enabled():
            return _Lookup.apply(self.weight, index, self).view(*sparse.shape, self.dim)
        return self.vectors(self.source(index)).view(*sparse.shape, self.dim)

    def source(self, rows: torch.Tensor) -> Found:
        """The weight itself, or, where it lies in host memory and a GPU asks, the part of it that has these rows."""
        if self.storage.placement == "device" or not on_gpu(rows):
            return super().source(rows)
        from model.kernels import staging, update

        weight = self.weight.detach()
        order = update.sort_lookups(rows.flatten(), len(weight))
        part, slots = staging.stage(weight, *order)
        return Found(part, slots.view(rows.shape), order)

    def _take_step(
        self, index: torch.Tensor, grad: torch.Tensor, order: Order | None, skip: torch.Tensor | None
    ) -> None:
        if not (on_gpu(grad) and self.has_kernels):
            return super()._take_step(index, grad, order, skip)
        from model.kernels.update import update

        rule = self.optimizer
        update(
            self.weight, self.state(), index, grad, rule.name, rule.epsilon, rule.betas, self.lr,
            self._scale_scalar, self._step_scalar, self.storage.stochastic, skip, order,
        )  # fmt: skip


class TorchEmbedding(_Tables):
    """The same through torch's own sparse gradients: slower, the specification of JointEmbedding. float32 only."""

    def __init__(self, *settings, **more):
        super().__init__(*settings, **more)
        self.weight.register_post_accumulate_grad_hook(self._after_backward)

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """ids int32 [B, T] -> vectors float32 [B, T, D]."""
        return F.embedding(self.rows(sparse), self.weight, sparse=True).view(*sparse.shape, self.dim)

    def _after_backward(self, weight: torch.Tensor) -> None:
        gradient = weight.grad.coalesce()
        weight.grad = None
        self.update(gradient.indices()[0], gradient.values())
