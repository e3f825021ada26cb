"""Parts of embedding tables as tensors in safetensors files: written by whoever holds them, read by whoever needs them.

A whole table is called table_03, a piece of one table_03[1000:2000,0:64] by its rows and columns, and what an optimiser
remembers of either has its own name behind it: table_03.sum.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from model.config import ModelConfig

READ_ROWS = 1 << 18  # of a table at a time, so that reading it needs no second copy
TYPES = ("F32", "BF16", "F16")  # safetensors' names
PIECE = re.compile(r"table_(\d+)(?:\[(\d+):(\d+),(\d+):(\d+)\])?(?:\.(\w+))?")


@dataclass(frozen=True)
class TableSlice:
    """A part of a table in memory: its place, its weight [rows, columns], and what the optimiser remembers of it,
    [rows] or [rows, columns]; views."""

    table: int
    rows: slice
    columns: slice
    weight: torch.Tensor
    state: dict[str, torch.Tensor]


def parts_of(embedding) -> list[TableSlice]:
    """What this process holds of the tables."""
    if hasattr(embedding, "parts"):
        pieces = [piece for held in embedding.parts() for piece in held]
        return [TableSlice(p.table, slice(p.begin, p.end), slice(p.left, p.right), *more) for p, *more in pieces]
    states = {name: tensor.split(embedding.sizes) for name, tensor in embedding.state().items()}
    return [
        TableSlice(t, slice(0, len(table)), slice(0, table.shape[1]), table, {name: s[t] for name, s in states.items()})
        for t, table in enumerate(embedding.tables())
    ]


def name_of(part: TableSlice, config: ModelConfig) -> str:
    """What the part's tensor is called in a file."""
    rows, columns = part.rows, part.columns
    if (rows, columns) == (slice(0, config.categorical_feature_sizes[part.table]), slice(0, config.embedding_dim)):
        return f"table_{part.table:02}"
    return f"table_{part.table:02}[{rows.start}:{rows.stop},{columns.start}:{columns.stop}]"


def on_every_rank(embedding, table: int) -> bool:
    """Whether every rank holds the table."""
    return hasattr(embedding, "plan") and table in embedding.plan.replicated


class StoredError(Exception):
    """Tensors that a checkpoint lacks, has twice, or has in another shape."""


class Stored:
    """The tensors by table in those of a checkpoint's files that are of one kind ("tables", "optimizer"), read in
    slices; others: all its other tensors."""

    def __init__(self, folder: Path, names: Iterable[str], kind: str):
        self._files = [safe_open(folder / name, "pt") for name in names if name.partition(".")[0] == kind]
        self._pieces: dict[tuple[int, str], list] = {}
        self.others: dict[str, torch.Tensor] = {}
        for file in self._files:
            for name in file.keys():  # noqa: SIM118 - safetensors' file is no dict
                match = PIECE.fullmatch(name)
                if not match:
                    self.others[name] = file.get_tensor(name)
                    continue
                table, *place, key = match.groups()
                place = tuple(map(int, place)) if place[0] else (0, None, 0, None)
                self._pieces.setdefault((int(table), key or ""), []).append((place, file.get_slice(name)))

    def check(self, config: ModelConfig, keys: dict[str, int]) -> None:
        """Raise StoredError unless the pieces make up every table of the model once, and nothing else is there.

        keys: what is stored of each table, by name ("": the weight), and its dimensions: 2, [rows, D], or 1, [rows].
        """
        sizes, dim = config.categorical_feature_sizes, config.embedding_dim
        for table, key in self._pieces:
            if table >= len(sizes) or key not in keys:
                raise StoredError(f"expected no {_name(table, key)}")
        for table, rows in enumerate(sizes):
            for key, dimensions in keys.items():
                places = [
                    _checked(place, stored, (rows, dim)[:dimensions], _name(table, key))
                    for place, stored in self._pieces.get((table, key), ())
                ]
                area = sum((end - begin) * (right - left) for begin, end, left, right in places)
                if area != rows * (dim if dimensions == 2 else 1) or _overlap(places):
                    raise StoredError(f"{_name(table, key)}: its pieces are not all there, or are there twice")

    def read(self, part: TableSlice, key: str, into: torch.Tensor) -> None:
        """Fill [rows] or [rows, columns] of a part, from all stored pieces that it meets; after check()."""
        for (begin, end, left, right), stored in self._pieces.get((part.table, key), ()):
            low, high = max(begin, part.rows.start), min(end or part.rows.stop, part.rows.stop)
            first, last = max(left, part.columns.start), min(right or part.columns.stop, part.columns.stop)
            for at in range(low, high, READ_ROWS):
                to = min(at + READ_ROWS, high)
                block, from_ = into[at - part.rows.start : to - part.rows.start], slice(at - begin, to - begin)
                if into.dim() == 2 and first < last:
                    block = block[:, first - part.columns.start : last - part.columns.start]
                    block.copy_(stored[from_, first - left : last - left])
                elif into.dim() == 1:
                    block.copy_(stored[from_])


def _name(table: int, key: str) -> str:
    return f"table_{table:02}" + (f".{key}" if key else "")


def _checked(place: tuple, stored, whole: tuple[int, ...], name: str) -> tuple[int, int, int, int]:
    """The place of a piece within a tensor of shape `whole`. Raises StoredError where it lies elsewhere, or has another
    shape."""
    begin, end, left, right = (0, whole[0], 0, whole[-1]) if place[1] is None else place
    if len(whole) == 1:
        left, right = 0, 1
    shape, expected = tuple(stored.get_shape()), (end - begin, right - left)[: len(whole)]
    inside = 0 <= begin < end <= whole[0] and 0 <= left < right <= (whole[1] if len(whole) == 2 else 1)
    if shape != expected or not inside or stored.get_dtype() not in TYPES:
        raise StoredError(
            f"{name}: expected {list(expected)} of {list(whole)} numbers ({', '.join(TYPES)}), found {list(shape)}, "
            f"{stored.get_dtype()}"
        )
    return begin, end, left, right


def _overlap(places: list[tuple[int, int, int, int]]) -> bool:
    return any(
        a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for i, a in enumerate(places) for b in places[:i]
    )
