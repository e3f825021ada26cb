"""Which rank holds which part of which embedding table: the plan, made, shown, saved, read back and checked.

    python -m model.sharding --model_config mlperf_40m.limit --world 8 --gpu h200 --batch_size 65536

prints the plan and what a step of it costs on machines that need not be here (placement.py makes plans, predict.py has
the formulas).

A table is replicated (every rank holds it; its dense gradient is all-reduced), or cut into pieces of rows and columns,
each on one rank. Whole tables are pieces too, so that one exchange serves all of them (exchange.py). Per step, a piece
of width W costs every rank b ids out and b vectors of W numbers back (b: local batch), and its owner B = N b look-ups:

- columns: the pieces' widths add up to D, so cutting by columns moves no byte more than the whole table, only more
  ids, and divides the load exactly; row-wise Adagrad needs whole rows for its mean square, so it can't be cut so;
- rows: with static shapes the owner of every piece of k answers each id, with zeros for those of others: k times the
  vectors. (A reduce-scatter moves as much: b D (N - 1) in and out of a rank. Sending each id only to its owner would
  move less, but shapes would follow the data, and no CUDA graph could hold them.) So rows are cut only where memory
  leaves no other way.
- replicated: no exchange, 2 R D (N - 1) / N numbers of all-reduce; less than the exchange where R < b.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import typed
from model import atomic
from model.config import ConfigError, ModelConfig

VERSION = 1
NUMBER = 4  # bytes of a weight, float32
COLUMN_OPTIMIZERS = ("sgd", "adagrad", "adam")
# What an optimiser remembers, in numbers an element of a table, and in numbers a row.
STATE_NUMBERS = {"sgd": (0, 0), "rowwise_adagrad": (0, 1), "adagrad": (1, 0), "adam": (2, 0)}


class PlanError(ConfigError):
    """A plan that is damaged, belongs to another model, or does not fit."""


@dataclass(frozen=True, order=True)
class Piece:
    """Rows begin to end and columns left to right of table `table`, held by `rank`."""

    rank: int
    table: int
    begin: int
    end: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.end - self.begin

    @property
    def width(self) -> int:
        """How many columns it has."""
        return self.right - self.left


@dataclass(frozen=True)
class Plan:
    """world: number of ranks; sizes: rows of each table; dim: their width; replicated: tables that every rank holds;
    pieces: of the others, sorted."""

    world: int
    sizes: tuple[int, ...]
    dim: int
    replicated: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def of(self, rank: int) -> list[Piece]:
        """A rank's pieces."""
        return [piece for piece in self.pieces if piece.rank == rank]

    def kind(self, table: int) -> str:
        """replicated, whole, rows, columns, or rows and columns."""
        pieces = [piece for piece in self.pieces if piece.table == table]
        cut = (("rows", any(p.rows < self.sizes[table] for p in pieces)),
               ("columns", any(p.width < self.dim for p in pieces)))  # fmt: skip
        return "replicated" if not pieces else " and ".join(name for name, is_cut in cut if is_cut) or "whole"

    def kinds(self) -> dict[str, int]:
        """How many tables are placed how."""
        found = [self.kind(t) for t in range(len(self.sizes))]
        return {kind: found.count(kind) for kind in sorted(set(found))}

    def to_json(self) -> dict:
        """The JSON object that read_plan reads: by table, with the ranks of each, so that people can edit it."""
        tables = []
        for t, rows in enumerate(self.sizes):
            found = {"table": t, "rows": rows}
            if t in self.replicated:
                found["replicated"] = True
            else:
                found["pieces"] = [
                    {"rank": p.rank, "rows": [p.begin, p.end], "columns": [p.left, p.right]}
                    for p in self.pieces if p.table == t
                ]  # fmt: skip
            tables.append(found)
        return {"version": VERSION, "world": self.world, "dim": self.dim, "tables": tables}

    def write(self, path: Path) -> None:
        """Save it."""
        values = self.to_json()
        lines = [json.dumps(table, allow_nan=False) for table in values.pop("tables")]
        head = json.dumps(values, allow_nan=False)[:-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, head + ', "tables": [\n  ' + ",\n  ".join(lines) + "\n]}\n")

    def check(self, config: ModelConfig, world: int, optimizer: str, where: str) -> None:
        """Raise PlanError, naming `where`, unless it covers every table of this model once, on these ranks."""
        ours = (config.categorical_feature_sizes, config.embedding_dim)
        if (self.sizes, self.dim) != ours:
            raise PlanError(
                f"{where}: made for {len(self.sizes)} tables of {sum(self.sizes):,} rows and dim {self.dim}; this "
                f"model has {len(ours[0])} of {sum(ours[0]):,} and dim {ours[1]}"
            )
        if self.world != world:
            raise PlanError(f"{where}: made for {self.world} ranks, started with {world}; make another plan")
        for t in range(len(self.sizes)):
            self._check_table(t, optimizer, where)

    def _check_table(self, table: int, optimizer: str, where: str) -> None:
        size, pieces = self.sizes[table], [piece for piece in self.pieces if piece.table == table]
        if table in self.replicated:
            if pieces:
                raise PlanError(f"{where}: table {table} is replicated and has pieces as well")
            return
        for p in pieces:
            if not (0 <= p.rank < self.world and 0 <= p.begin < p.end <= size and 0 <= p.left < p.right <= self.dim):
                raise PlanError(
                    f"{where}: table {table}: expected ranks 0 to {self.world - 1}, rows within 0 to {size} and "
                    f"columns within 0 to {self.dim}, got {asdict(p)}"
                )
        if optimizer not in COLUMN_OPTIMIZERS and any(p.width < self.dim for p in pieces):
            raise PlanError(f"{where}: table {table} is cut by columns, but {optimizer} needs whole rows; cut by rows")
        area = sum(p.rows * p.width for p in pieces)
        for i, a in enumerate(pieces):
            for b in pieces[:i]:
                if a.begin < b.end and b.begin < a.end and a.left < b.right and b.left < a.right:
                    raise PlanError(f"{where}: table {table}: {asdict(b)} and {asdict(a)} overlap")
        if area != size * self.dim:
            raise PlanError(f"{where}: table {table}: its pieces leave {size * self.dim - area:,} numbers to no rank")


def whole(world: int, config: ModelConfig, ranks: Sequence[int]) -> Plan:
    """Every table whole, table t on ranks[t]."""
    sizes, dim = config.categorical_feature_sizes, config.embedding_dim
    pieces = (Piece(rank, t, 0, size, 0, dim) for t, (size, rank) in enumerate(zip(sizes, ranks, strict=True)))
    return Plan(world, sizes, dim, (), tuple(sorted(pieces)))


@dataclass(frozen=True)
class PieceEntry:
    """A piece in a plan's file."""

    __pydantic_config__ = typed.STRICT

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True)
class TableEntry:
    """A table in a plan's file: replicated, or in pieces."""

    __pydantic_config__ = typed.STRICT

    table: int
    rows: int
    replicated: bool = False
    pieces: tuple[PieceEntry, ...] = ()


@dataclass(frozen=True)
class PlanFile:
    """A plan's file, as it is written."""

    __pydantic_config__ = typed.STRICT

    version: int
    world: int
    dim: int
    tables: tuple[TableEntry, ...]

    def __post_init__(self):
        numbers = [table.table for table in self.tables]
        if numbers != list(range(len(numbers))):
            raise PlanError(f"tables: expected the tables 0 to {len(numbers) - 1} in order, got {numbers}")


def read_plan(path: Path) -> Plan:
    """A saved plan. Raises PlanError where the file is no plan (whether it fits a model is for Plan.check)."""
    found = typed.read_json(PlanFile, Path(path).read_bytes(), f"--plan {path}", PlanError, VERSION)
    pieces = (
        Piece(piece.rank, table.table, *piece.rows, *piece.columns) for table in found.tables for piece in table.pieces
    )
    replicated = tuple(table.table for table in found.tables if table.replicated)
    return Plan(found.world, tuple(table.rows for table in found.tables), found.dim, replicated, tuple(sorted(pieces)))
