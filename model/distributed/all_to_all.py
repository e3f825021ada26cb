"""The exchange of sharded embeddings: ids out, vectors back, gradients out; planner/plan.py says who holds what.

N ranks, global batch B, b the largest local batch (ceil(B / N)), P_d pieces on rank d, W_d the sum of their widths:

    ids      int32 [b, T]  --all-to-all-->  [N, P_d, b]       ahead of time, while the step before still runs
    vectors  [N, b, W_d]   --all-to-all-->  [b, T, D]         while the bottom MLP runs
    gradient [b, T, D]     --all-to-all-->  [N, b, W_d]       while the bottom MLP's backward runs

All shapes follow from B, the plan and the rank, never from the data, so that a full batch's step can sit in a CUDA
graph. Vectors to and from a rank stand as [b, pieces, width] for each group of its pieces, one group behind the other.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from model.distributed.process_group import Ranks
from model.planner.plan import Piece, Plan

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
class Group:
    """Pieces of one rank and one width: columns of the ids received, and of the vectors sent."""

    width: int
    pieces: tuple[Piece, ...]

    def parts(self) -> dict[int, list[int]]:
        """Their tables by first column: they land in the result together."""
        found: dict[int, list[int]] = {}
        for piece in self.pieces:
            found.setdefault(piece.left, []).append(piece.table)
        return found


def _groups(pieces: list[Piece]) -> list[Group]:
    """A rank's pieces by width, in an order that all ranks agree on."""
    by_width: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: (-p.width, p.left, p.table, p.begin)):
        by_width.setdefault(piece.width, []).append(piece)
    return [Group(width, tuple(found)) for width, found in by_width.items()]


@dataclass
class Step:
    """What a stage of the exchange leaves for the next: batch, this rank's rows; padded, b; what is under way."""

    batch: int
    padded: int
    received: torch.Tensor | None = None
    work: object | None = None
    shapes: list[torch.Size] = field(default_factory=list)


class _Send(torch.autograd.Function):
    """Vectors of the own pieces -> the exchange, under way. Its node is older than the bottom MLP's, so that backward
    comes here last: the wait for the gradients has the MLP's backward to hide behind."""

    @staticmethod
    def forward(ctx, anchor, exchange, step, *vectors):
        ctx.exchange, ctx.step = exchange, step
        exchange.send_vectors(step, vectors)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, None, None, *ctx.exchange.received_gradients(ctx.step)


class _Receive(torch.autograd.Function):
    """The exchange under way -> vectors [b, T, D]; in backward the first to run: gradients leave at once."""

    @staticmethod
    def forward(ctx, token, exchange, step):
        ctx.exchange, ctx.step = exchange, step
        return exchange.received_vectors(step)

    @staticmethod
    def backward(ctx, grad):
        ctx.exchange.send_gradients(ctx.step, grad)
        return grad.new_zeros(()), None, None


class Exchange:
    """What the ranks of a plan send each other. wire: dtype of vectors and gradients on their way; tensors are made on
    torch's default device, which must be the ranks'."""

    def __init__(self, plan: Plan, ranks: Ranks, wire: torch.dtype = torch.float32):
        self.plan, self.wire, self._ranks = plan, wire, ranks
        groups = [_groups(plan.of(rank)) for rank in range(plan.world)]
        pieces = [[p for group in found for p in group.pieces] for found in groups]
        self.own, own = groups[ranks.rank], pieces[ranks.rank]
        self._pieces_of = [len(found) for found in pieces]
        self._widths = [sum(p.width for p in found) for found in pieces]
        self._rows_cut = any(p.rows < plan.sizes[p.table] for found in pieces for p in found)
        self._columns = torch.tensor([p.table for found in pieces for p in found], dtype=torch.long)
        self._begins = torch.tensor([p.begin for p in own], dtype=torch.int32).unsqueeze(1)
        self._rows = torch.tensor([p.rows for p in own], dtype=torch.int32).unsqueeze(1)
        self._groups = [
            [(group, [(left, torch.tensor(tables, dtype=torch.long)) for left, tables in group.parts().items()])
             for group in found]
            for found in groups
        ]  # fmt: skip
        self._anchor = torch.zeros((), requires_grad=True)

    def route(self, sparse: torch.Tensor, rows: int | None) -> RoutedIds:
        """Start ids int32 [<= b, T] of a local batch on their way to the owners. rows: of the global batch; None: as
        many on every rank as here."""
        world = self.plan.world
        padded = len(sparse) if rows is None else -(-rows // world)
        out = sparse.new_full((len(self._columns), padded), PADDING)
        out[:, : len(sparse)] = sparse.t()[self._columns]
        own = self._pieces_of[self._ranks.rank]
        received = sparse.new_empty(world, own, padded)
        sizes = [own * padded] * world, [pieces * padded for pieces in self._pieces_of]
        return RoutedIds(sparse, received, self._ranks.all_to_all(received.view(-1), out.view(-1), *sizes, ids=True))

    def look_ups(self, routed: RoutedIds) -> list[torch.Tensor]:
        """For each own group, rows of its pieces to look up, int32 [N * b, pieces]; the row behind a piece's last for
        ids that are not its own."""
        ids = routed.wait()
        world, own, padded = ids.shape
        local = ids - self._begins
        local = torch.where((local < 0) | (local >= self._rows), self._rows, local)
        local = local.transpose(1, 2).reshape(world * padded, own)
        return list(local.split([len(group.pieces) for group in self.own], 1))

    def send(self, routed: RoutedIds, vectors: list[torch.Tensor]) -> tuple[torch.Tensor, Step]:
        """Vectors [N * b, pieces, width] of each own group: off to the ranks that asked. Gives what receive() takes."""
        step = Step(len(routed.local), routed.received.shape[2], shapes=[v.shape for v in vectors])
        return _Send.apply(self._anchor, self, step, *vectors), step

    def receive(self, token: torch.Tensor, step: Step) -> torch.Tensor:
        """Vectors float32 [b, T, D]; those of replicated tables are not filled in."""
        return _Receive.apply(token, self, step)

    # The four stages, called by _Send and _Receive.

    def send_vectors(self, step: Step, vectors: tuple[torch.Tensor, ...]) -> None:
        """Vectors [N * b, pieces, width] of each own group: off to the ranks that asked."""
        world, padded = self.plan.world, step.padded
        own = self._widths[self._ranks.rank] * padded
        out = self._joined([v.view(world, -1) for v in vectors], (world, own))
        step.received = out.new_empty(padded * sum(self._widths))
        step.work = self._ranks.all_to_all(
            step.received, out.view(-1), [padded * width for width in self._widths], [own] * world
        )

    def received_vectors(self, step: Step) -> torch.Tensor:
        """Vectors [b, T, D]; those of replicated tables are not filled in."""
        step.work.wait()
        make = torch.zeros if self._rows_cut else torch.empty
        out = make(step.batch, len(self.plan.sizes), self.plan.dim, device=step.received.device)
        for block, left, tables in self._blocks(step.received, step.padded):
            place, vectors = out[:, :, left : left + block.shape[2]], block[: step.batch].float()
            if self._rows_cut:  # adding to zero is exact; of a table's row pieces, all but one add zeros
                place.index_add_(1, tables, vectors)
            else:
                place.index_copy_(1, tables, vectors)
        step.received = step.work = None
        return out

    def send_gradients(self, step: Step, grad: torch.Tensor) -> None:
        """Gradients [b, T, D]: off to the owners."""
        out = torch.empty(step.padded * sum(self._widths), dtype=self.wire, device=grad.device)
        grad = grad.to(self.wire)
        for block, left, tables in self._blocks(out, step.padded):
            torch.index_select(grad[:, :, left : left + block.shape[2]], 1, tables, out=block[: step.batch])
            block[step.batch :] = 0
        world, own = self.plan.world, self._widths[self._ranks.rank] * step.padded
        step.received = out.new_empty(world * own)
        step.work = self._ranks.all_to_all(
            step.received, out, [own] * world, [step.padded * width for width in self._widths]
        )

    def received_gradients(self, step: Step) -> list[torch.Tensor]:
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
            return torch.empty(shape, dtype=self.wire, device=self._columns.device)
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)).to(self.wire)

    def _blocks(self, wire: torch.Tensor, padded: int):
        """Of vectors from (or gradients to) all ranks, [sum of b * W_d]: (block [b, n, width], its first column,
        its tables [n]); views."""
        at = 0
        for groups in self._groups:
            for group, by_left in groups:
                size = padded * len(group.pieces) * group.width
                block = wire[at : at + size].view(padded, len(group.pieces), group.width)
                first = 0
                for left, tables in by_left:
                    yield block[:, first : first + len(tables)], left, tables
                    first += len(tables)
                at += size
