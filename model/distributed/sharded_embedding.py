"""Embedding tables held in pieces by many ranks, as one module; planner/plan.py places, all_to_all.py exchanges.

Every piece has one row more than it holds, the spare: ids of other pieces of a table cut by rows, and the padding of
ranks with fewer rows than others, point there. It is zero at every look-up, and what a step makes of it is thrown away;
so the vectors need no mask, and no row is touched that the batch does not have (Adam would move it).
"""

import torch
from torch import nn

from model.distributed.all_to_all import Exchange, RoutedIds, Step
from model.distributed.process_group import Ranks
from model.layers.embedding import JointEmbedding, Order, TorchEmbedding, initial_rows, on_gpu
from model.layers.optimizers import Optimizer, add_rows_
from model.planner.plan import Piece, Plan


class ReplicatedTables(JointEmbedding):
    """Tables that every rank holds. The gradient of all ranks' rows is summed densely, then every rank takes the same
    step. `reduce` starts the sum; finish() takes the step once it is complete."""

    def __init__(self, sizes: tuple[int, ...], dim: int, optimizer: Optimizer, reduce):
        super().__init__(sizes, dim, False, optimizer, draw=False)
        rows = sum(sizes)
        # Adam moves a row that was looked up even if its gradient is zero, and none else: count look-ups as well.
        self._counts = optimizer.name == "adam"
        self._sum = torch.zeros(rows * (dim + self._counts))
        self._reduce = reduce
        self.register_buffer("every_row", torch.arange(rows), persistent=False)
        self.register_buffer("_minus_one", torch.full((), -1.0), persistent=False)
        self.register_buffer("_one", torch.ones(()), persistent=False)

    def update(
        self, index: torch.Tensor, grad: torch.Tensor, *, skip: torch.Tensor | None = None,
        order: Order | None = None, checked: bool = False,
    ) -> None:  # fmt: skip
        """Sum up this rank's gradients [n, D] of rows index int64 [n], and start the sum over all ranks."""
        rows, dim = self.weight.shape
        sums = self._sum[: rows * dim].view(rows, dim)
        if on_gpu(grad) and self.has_kernels:
            from model.kernels import update

            # SGD of rate -1: a small table has thousands of look-ups a row, and sums in the order of arrival have other
            # bits each time.
            scalars = self._minus_one, self._one, self._step_scalar
            update.update(sums, {}, index, grad, "sgd", 0.0, (0.0, 0.0), *scalars, order=order)
        else:
            add_rows_(sums, index, grad.float())
        if self._counts:  # sums of ones are exact in any order
            self._sum[rows * dim :].index_add_(0, index, grad.new_ones(len(index), dtype=torch.float32))
        self._reduce(self._sum, self.finish)

    def finish(self) -> None:
        """Take the step with the sum over all ranks."""
        rows, dim = self.weight.shape
        gradient, index = self._sum[: rows * dim].view(rows, dim), self.every_row
        if self._counts and on_gpu(gradient) and self.has_kernels:
            # How many rows were looked up, only the device knows: the others add their zeros to one that was.
            counts = self._sum[rows * dim :]
            index = torch.where(counts > 0, index, counts.argmax())
        elif self._counts:
            index = self._sum[rows * dim :].nonzero().squeeze(1)
            gradient = gradient[index]
        super().update(index, gradient)
        if not self.held():
            self._sum.zero_()

    def release(self, skip: torch.Tensor) -> None:
        """See embedding.py."""
        super().release(skip)
        self._sum.zero_()


class ShardedEmbedding(nn.Module):
    """The tables of a plan, this rank's part of them; the interface of model.embedding, for local batches.

    reduce(sum, then): starts the all-reduce of a tensor, calls then() when backward ends (see gradient_reducer.py).
    wire: dtype of vectors and gradients on their way, float32, bfloat16 or float16. fused: as DLRM's fused_embedding.
    """

    def __init__(
        self, plan: Plan, ranks: Ranks, optimizer: Optimizer, hash_indices: bool = False, reduce=None,
        wire: torch.dtype = torch.float32, fused: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.plan, self.optimizer, self._rank = plan, optimizer, ranks.rank
        self.sizes, self.dim, self.hash_indices = plan.sizes, plan.dim, hash_indices
        self._exchange = Exchange(plan, ranks, wire)
        table = JointEmbedding if fused else TorchEmbedding
        self.shards = nn.ModuleList(
            table(tuple(p.rows + 1 for p in group.pieces), group.width, False, optimizer, draw=False)
            for group in self._exchange.own
        )
        self.replicas = None
        if plan.replicated:
            self.replicas = ReplicatedTables(tuple(plan.sizes[t] for t in plan.replicated), plan.dim, optimizer, reduce)
        self.register_buffer("lr", torch.zeros(()), persistent=False)
        self.register_buffer("_limits", torch.tensor(self.sizes, dtype=torch.int32), persistent=False)
        self.register_buffer("_replicated", torch.tensor(plan.replicated, dtype=torch.long), persistent=False)
        # One rank with all tables, whole: no exchange at all.
        everything = tuple(Piece(0, t, 0, size, 0, plan.dim) for t, size in enumerate(plan.sizes))
        self._direct = [group.pieces for group in self._exchange.own] == [everything]
        for tables in self._held():
            tables.lr = self.lr
        self._draw()
        self._step, self._loss_scale = 0, 1.0
        self._begun: tuple[object, RoutedIds, torch.Tensor, Step] | None = None

    @property
    def whole(self) -> JointEmbedding | TorchEmbedding | None:
        """All tables, where this rank holds them, each whole; they take what local_ids() gives."""
        return self.shards[0] if self._direct else None

    def local_ids(self, sparse: torch.Tensor | RoutedIds) -> torch.Tensor:
        """ids int32 [b, T] of the own rows, hashed where that is wanted."""
        return (sparse if isinstance(sparse, RoutedIds) else self.route(sparse)).local

    def _held(self) -> list[JointEmbedding | TorchEmbedding]:
        return [*self.shards, *([self.replicas] if self.replicas is not None else [])]

    @torch.no_grad()
    def _draw(self) -> None:
        """Initial weights: the numbers that one process would draw, this rank's part of them kept."""
        held = self.parts()
        for t, size in enumerate(self.sizes):
            for begin, rows in initial_rows(size, self.dim, self.lr.device):
                for piece, weight, _ in held[t]:
                    low, high = max(begin, piece.begin), min(begin + len(rows), piece.end)
                    if low < high:
                        block = rows[low - begin : high - begin, piece.left : piece.right]
                        weight[low - piece.begin : high - piece.begin] = block

    def parts(self) -> list[list[tuple[Piece, torch.Tensor, dict[str, torch.Tensor]]]]:
        """By table, what this rank holds of it: the piece (a replicated table is one piece of every rank), its weight
        [rows, width], and what the optimiser remembers of it, [rows] or [rows, width]; views."""
        found: list[list] = [[] for _ in self.sizes]
        groups = [(group.pieces, shard, 1) for group, shard in zip(self._exchange.own, self.shards, strict=True)]
        if self.replicas is not None:
            copies = (Piece(self._rank, t, 0, self.sizes[t], 0, self.dim) for t in self.plan.replicated)
            groups.append((tuple(copies), self.replicas, 0))
        for pieces, tables, spare in groups:
            states = {name: tensor.split(tables.sizes) for name, tensor in tables.state().items()}
            for i, (piece, weight) in enumerate(zip(pieces, tables.tables(), strict=True)):
                end = len(weight) - spare
                state = {name: parts[i][:end] for name, parts in states.items()}
                found[piece.table].append((piece, weight[:end], state))
        return found

    @property
    def weight(self) -> torch.Tensor:
        """A tensor on the tables' device (there is no joint weight)."""
        return self.lr

    @property
    def step(self) -> int:
        """Number of the step, from 1."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = value
        for tables in self._held():
            tables.step = value

    @property
    def loss_scale(self) -> float:
        """What gradients are divided by."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale = value
        for tables in self._held():
            tables.loss_scale = value

    def hold(self, flag: torch.Tensor | None = None) -> None:
        """This and the next two: see embedding.py."""
        for tables in self._held():
            tables.hold(flag)

    def held(self) -> list[torch.Tensor]:
        """Gradients of this rank's pieces, and those of all ranks of the replicated tables."""
        return [grad for tables in self._held() for grad in tables.held()]

    def release(self, skip: torch.Tensor) -> None:
        """Take the steps, unless `skip` is above 0, as it must be on all ranks or on none."""
        for tables in self._held():
            tables.release(skip)

    def route(self, sparse: torch.Tensor, rows: int | None = None) -> RoutedIds:
        """Start ids int32 [<= b, T] of a local batch on their way to the owners. rows: of the global batch; None: as
        many on every rank as here."""
        if self.hash_indices:
            sparse = sparse % self._limits
        if self._direct:
            return RoutedIds(sparse, sparse, None)
        return self._exchange.route(sparse, rows)

    def begin(self, sparse: torch.Tensor | RoutedIds) -> None:
        """Look up what the ranks ask of the own pieces and send it off. forward() does so itself where nobody did
        before; called before the bottom MLP, the exchange has time to happen."""
        if self._direct:
            return
        routed = sparse if isinstance(sparse, RoutedIds) else self.route(sparse)
        self._clear_spares()
        rows = self._exchange.look_ups(routed)
        vectors = [shard(found) for shard, found in zip(self.shards, rows, strict=True)]
        self._begun = sparse, routed, *self._exchange.send(routed, vectors)

    @torch.no_grad()
    def _clear_spares(self) -> None:
        for shard in self.shards:
            spares = shard.begins + shard.limits - 1
            for tensor in (shard.weight, *shard.state().values()):
                tensor.index_fill_(0, spares, 0.0)

    def forward(self, sparse: torch.Tensor | RoutedIds) -> torch.Tensor:
        """ids int32 [b, T], or what route() made of them -> vectors float32 [b, T, D]."""
        if self._direct:
            return self.whole(self.local_ids(sparse))
        if self._begun is None or self._begun[0] is not sparse:
            self.begin(sparse)
        _, routed, token, step = self._begun
        self._begun = None
        if self.replicas is None:
            return self._exchange.receive(token, step)
        copies = self.replicas(routed.local[:, self._replicated])
        return self._exchange.receive(token, step).index_copy_(1, self._replicated, copies)
