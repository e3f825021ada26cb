"""Embedding tables held in pieces by many ranks: ids out, vectors back, gradients out; the plan is sharding.py's.

N ranks, global batch B, b the largest local batch (ceil(B / N)), P_d pieces on rank d, W_d the sum of their widths:

    ids      int32 [b, T]  --all-to-all-->  [N, P_d, b]       ahead of time, while the step before still runs
    vectors  [N, b, W_d]   --all-to-all-->  [b, T, D]         while the bottom MLP runs
    gradient [b, T, D]     --all-to-all-->  [N, b, W_d]       while the bottom MLP's backward runs

All shapes follow from B, the plan and the rank, never from the data, so that a full batch's step can sit in a CUDA
graph. Every piece has one row more than it holds, the spare: ids of other pieces of a table cut by rows, and the
padding of ranks with fewer rows than b, point there. It is zero at every look-up, and what a step makes of it is thrown
away; so the vectors need no mask, and no row is touched that the batch does not have (Adam would move it).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from model.embedding import JointEmbedding, TorchEmbedding, initial_rows
from model.optimizers import Optimizer
from model.ranks import Ranks
from model.sharding import Piece, Plan

PADDING = -1


class RoutedIds(NamedTuple):
    """Ids on their way: local int32 [b, T], this rank's own; received int32 [N, P, b], for this rank's pieces, complete
    after work.wait() (None: already there)."""

    local: torch.Tensor
    received: torch.Tensor
    work: object | None

    def wait(self) -> torch.Tensor:
        """The received ids."""
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass(frozen=True)
class _Group:
    """Pieces of one rank and one width: columns of the ids received, and of the vectors sent."""

    width: int
    pieces: tuple[Piece, ...]

    def parts(self) -> dict[int, list[int]]:
        """Their tables by first column: they land in the result together."""
        found: dict[int, list[int]] = {}
        for piece in self.pieces:
            found.setdefault(piece.left, []).append(piece.table)
        return found


def _groups(pieces: list[Piece]) -> list[_Group]:
    """A rank's pieces by width, in an order that all ranks agree on."""
    by_width: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: (-p.width, p.left, p.table, p.begin)):
        by_width.setdefault(piece.width, []).append(piece)
    return [_Group(width, tuple(found)) for width, found in by_width.items()]


@dataclass
class _Step:
    """What one look-up leaves for the next stage: batch, this rank's rows; padded, b; the exchange under way."""

    batch: int
    padded: int
    received: torch.Tensor | None = None
    work: object | None = None
    shapes: list[torch.Size] = field(default_factory=list)


class _Send(torch.autograd.Function):
    """Vectors of the own pieces -> the exchange, under way. Its node is older than the bottom MLP's, so that backward
    comes here last: the wait for the gradients has the MLP's backward to hide behind."""

    @staticmethod
    def forward(ctx, anchor, module, step, *vectors):
        ctx.module, ctx.step = module, step
        module.send_vectors(step, vectors)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, None, None, *ctx.module.received_gradients(ctx.step)


class _Receive(torch.autograd.Function):
    """The exchange under way -> vectors [b, T, D]; in backward the first to run: gradients leave at once."""

    @staticmethod
    def forward(ctx, token, module, step):
        ctx.module, ctx.step = module, step
        return module.received_vectors(step)

    @staticmethod
    def backward(ctx, grad):
        ctx.module.send_gradients(ctx.step, grad)
        return grad.new_zeros(()), None, None


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

    def update(self, index: torch.Tensor, grad: torch.Tensor) -> None:
        """Sum up this rank's gradients [n, D] of rows index int64 [n], and start the sum over all ranks."""
        rows, dim = self.weight.shape
        self._sum[: rows * dim].view(rows, dim).index_add_(0, index, grad.float())
        if self._counts:
            self._sum[rows * dim :].index_add_(0, index, grad.new_ones(len(index), dtype=torch.float32))
        self._reduce(self._sum, self.finish)

    def finish(self) -> None:
        """Take the step with the sum over all ranks."""
        rows, dim = self.weight.shape
        gradient, index = self._sum[: rows * dim].view(rows, dim), self.every_row
        if self._counts:
            index = self._sum[rows * dim :].nonzero().squeeze(1)
            gradient = gradient[index]
        super().update(index, gradient)
        self._sum.zero_()


class ShardedEmbedding(nn.Module):
    """The tables of a plan, this rank's part of them; the interface of model.embedding, for local batches.

    reduce(sum, then): starts the all-reduce of a tensor, calls then() when backward ends (reduction.GradientReducer).
    wire: dtype of vectors and gradients on their way, float32, bfloat16 or float16. fused: as DLRM's fused_embedding.
    """

    def __init__(
        self, plan: Plan, ranks: Ranks, optimizer: Optimizer, hash_indices: bool = False, reduce=None,
        wire: torch.dtype = torch.float32, fused: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.plan, self.ranks, self.optimizer, self.wire = plan, ranks, optimizer, wire
        self.sizes, self.dim, self.hash_indices = plan.sizes, plan.dim, hash_indices
        self._groups = [_groups(plan.of(rank)) for rank in range(plan.world)]
        table = JointEmbedding if fused else TorchEmbedding
        self.shards = nn.ModuleList(
            table(tuple(p.rows + 1 for p in group.pieces), group.width, False, optimizer, False)
            for group in self._groups[ranks.rank]
        )
        self.replicas = None
        if plan.replicated:
            self.replicas = ReplicatedTables(tuple(plan.sizes[t] for t in plan.replicated), plan.dim, optimizer, reduce)
        self.register_buffer("lr", torch.zeros(()), persistent=False)
        self._anchor = torch.zeros((), requires_grad=True)
        for tables in self._held():
            tables.lr = self.lr
        self._index_pieces()
        self._draw()
        self._begun: tuple[object, RoutedIds, torch.Tensor, _Step] | None = None

    def _held(self) -> list[JointEmbedding | TorchEmbedding]:
        return [*self.shards, *([self.replicas] if self.replicas is not None else [])]

    def _index_pieces(self) -> None:
        """Index tensors of the exchange, made once."""
        pieces = [[p for group in groups for p in group.pieces] for groups in self._groups]
        self._pieces_of, own = [len(found) for found in pieces], pieces[self.ranks.rank]
        self._widths = [sum(p.width for p in found) for found in pieces]
        self._rows_cut = any(p.rows < self.sizes[p.table] for found in pieces for p in found)
        # One rank with all tables, whole: no exchange at all.
        self._direct = own == [Piece(0, t, 0, size, 0, self.dim) for t, size in enumerate(self.sizes)]
        tensors = {
            "columns": torch.tensor([p.table for found in pieces for p in found], dtype=torch.long),
            "limits": torch.tensor(self.sizes, dtype=torch.int32),
            "replicated": torch.tensor(self.plan.replicated, dtype=torch.long),
            "begins": torch.tensor([p.begin for p in own], dtype=torch.int32).unsqueeze(1),
            "rows": torch.tensor([p.rows for p in own], dtype=torch.int32).unsqueeze(1),
        }
        for name, tensor in tensors.items():
            self.register_buffer(f"_{name}", tensor, persistent=False)
        self._parts = [
            [[(left, torch.tensor(tables, dtype=torch.long)) for left, tables in group.parts().items()]
             for group in groups]
            for groups in self._groups
        ]  # fmt: skip

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
        rank = self.ranks.rank
        groups = [(group.pieces, shard, 1) for group, shard in zip(self._groups[rank], self.shards, strict=True)]
        if self.replicas is not None:
            copies = (Piece(rank, t, 0, self.sizes[t], 0, self.dim) for t in self.plan.replicated)
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

    def route(self, sparse: torch.Tensor, rows: int | None = None) -> RoutedIds:
        """Start ids int32 [<= b, T] of a local batch on their way to the owners. rows: of the global batch; None: as
        many on every rank as here."""
        if self.hash_indices:
            sparse = sparse % self._limits
        if self._direct:
            return RoutedIds(sparse, sparse, None)
        world = self.plan.world
        padded = len(sparse) if rows is None else -(-rows // world)
        out = sparse.new_full((len(self._columns), padded), PADDING)
        out[:, : len(sparse)] = sparse.t()[self._columns]
        own = self._pieces_of[self.ranks.rank]
        received = sparse.new_empty(world, own, padded)
        work = self.ranks.all_to_all(
            received.view(-1), out.view(-1), [own * padded] * world, [p * padded for p in self._pieces_of], ids=True
        )
        return RoutedIds(sparse, received, work)

    def begin(self, sparse: torch.Tensor | RoutedIds) -> None:
        """Look up what the ranks ask of the own pieces and send it off. forward() does so itself where nobody did
        before; called before the bottom MLP, the exchange has time to happen."""
        if self._direct:
            return
        routed = sparse if isinstance(sparse, RoutedIds) else self.route(sparse)
        ids = routed.wait()
        world, own, padded = ids.shape
        local = ids - self._begins
        local = torch.where((local < 0) | (local >= self._rows), self._rows, local)
        local = local.transpose(1, 2).reshape(world * padded, own)
        self._clear_spares()
        step, vectors, at = _Step(len(routed.local), padded), [], 0
        for group, shard in zip(self._groups[self.ranks.rank], self.shards, strict=True):
            vectors.append(shard(local[:, at : at + len(group.pieces)]))
            at += len(group.pieces)
        step.shapes = [v.shape for v in vectors]
        self._begun = sparse, routed, _Send.apply(self._anchor, self, step, *vectors), step

    @torch.no_grad()
    def _clear_spares(self) -> None:
        for shard in self.shards:
            spares = shard.begins + shard.limits - 1
            for tensor in (shard.weight, *shard.state().values()):
                tensor.index_fill_(0, spares, 0.0)

    def forward(self, sparse: torch.Tensor | RoutedIds) -> torch.Tensor:
        """ids int32 [b, T], or what route() made of them -> vectors float32 [b, T, D]."""
        if self._direct:
            return self.shards[0](sparse.local if isinstance(sparse, RoutedIds) else self.route(sparse).local)
        if self._begun is None or self._begun[0] is not sparse:
            self.begin(sparse)
        _, routed, token, step = self._begun
        self._begun = None
        if self.replicas is None:
            return _Receive.apply(token, self, step)
        copies = self.replicas(routed.local[:, self._replicated])
        return _Receive.apply(token, self, step).index_copy_(1, self._replicated, copies)

    # Four stages of the exchange, called by _Send and _Receive. On the wire, vectors to and from a rank stand as
    # [b, pieces, width] for each group of its pieces, one group behind the other.

    def send_vectors(self, step: _Step, vectors: tuple[torch.Tensor, ...]) -> None:
        """Vectors [N * b, pieces, width] of each own group: off to the ranks that asked."""
        world, padded = self.plan.world, step.padded
        own = self._widths[self.ranks.rank] * padded
        out = self._joined([v.view(world, -1) for v in vectors], (world, own))
        step.received = out.new_empty(padded * sum(self._widths))
        step.work = self.ranks.all_to_all(
            step.received, out.view(-1), [padded * width for width in self._widths], [own] * world
        )

    def received_vectors(self, step: _Step) -> torch.Tensor:
        """Vectors [b, T, D]; those of replicated tables are not filled in."""
        step.work.wait()
        make = self.lr.new_zeros if self._rows_cut else self.lr.new_empty
        out = make(step.batch, len(self.sizes), self.dim)
        for block, left, tables in self._blocks(step.received, step.padded):
            place, vectors = out[:, :, left : left + block.shape[2]], block[: step.batch].float()
            if self._rows_cut:  # adding to zero is exact; of a table's row pieces, all but one add zeros
                place.index_add_(1, tables, vectors)
            else:
                place.index_copy_(1, tables, vectors)
        step.received = step.work = None
        return out

    def send_gradients(self, step: _Step, grad: torch.Tensor) -> None:
        """Gradients [b, T, D]: off to the owners."""
        out = torch.empty(step.padded * sum(self._widths), dtype=self.wire, device=grad.device)
        grad = grad.to(self.wire)
        for block, left, tables in self._blocks(out, step.padded):
            torch.index_select(grad[:, :, left : left + block.shape[2]], 1, tables, out=block[: step.batch])
            block[step.batch :] = 0
        world, own = self.plan.world, self._widths[self.ranks.rank] * step.padded
        step.received = out.new_empty(world * own)
        step.work = self.ranks.all_to_all(
            step.received, out, [own] * world, [step.padded * width for width in self._widths]
        )

    def received_gradients(self, step: _Step) -> list[torch.Tensor]:
        """Gradients [N * b, pieces, width] of each own group."""
        step.work.wait()
        received, found, at = step.received.view(self.plan.world, -1), [], 0
        for shape in step.shapes:
            size = shape.numel() // self.plan.world
            found.append(received[:, at : at + size].reshape(shape).float())
            at += size
        step.received = step.work = None
        return found

    def _joined(self, tensors: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
        """The tensors side by side, in the wire's dtype."""
        if not tensors:
            return torch.empty(shape, dtype=self.wire, device=self.lr.device)
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)).to(self.wire)

    def _blocks(self, wire: torch.Tensor, padded: int):
        """Of vectors from (or gradients to) all ranks, [sum of b * W_d]: (block [b, n, width], its first column,
        its tables [n]); views."""
        at = 0
        for groups, parts in zip(self._groups, self._parts, strict=True):
            for group, by_left in zip(groups, parts, strict=True):
                size = padded * len(group.pieces) * group.width
                block = wire[at : at + size].view(padded, len(group.pieces), group.width)
                first = 0
                for left, tables in by_left:
                    yield block[:, first : first + len(tables)], left, tables
                    first += len(tables)
                at += size
