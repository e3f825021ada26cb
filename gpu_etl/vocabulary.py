"""Counts of category values -> ids: merging, thresholds, order, and the hash table that the encode pass reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_etl import manifest, npz, rows
from gpu_etl.errors import DataError
from gpu_etl.jit import compiled
from gpu_etl.schema import FIRST_SPARSE, SPARSE, Preset

FILE_NAME = manifest.VOCABULARY
ENTRIES = 1 + 2 * SPARSE  # arrays in the file
ENTRY_BYTES = 512  # at most, that one takes beside its values: two zip headers and one of .npy
VALUE_BYTES = 4 + 8  # key and count


@dataclass(frozen=True)
class ColumnCounts:
    """Distinct values of one column in any order: keys uint32 [k], counts int64 [k], first_rows int64 [k]."""

    keys: np.ndarray
    counts: np.ndarray
    first_rows: np.ndarray


@dataclass(frozen=True)
class Counts:
    """Partial vocabulary: the counts of 26 columns over some of the rows."""

    columns: tuple[ColumnCounts, ...]

    def merge(self, other: "Counts") -> "Counts":
        """Counts over the rows of both. Commutative and associative, so that workers can be merged in any order."""
        return Counts(tuple(_merge(a, b) for a, b in zip(self.columns, other.columns, strict=True)))


def _merge(a: ColumnCounts, b: ColumnCounts) -> ColumnCounts:
    keys, place = np.unique(np.concatenate([a.keys, b.keys]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, place, np.concatenate([a.counts, b.counts]))
    first_rows = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(first_rows, place, np.concatenate([a.first_rows, b.first_rows]))
    return ColumnCounts(keys, counts, first_rows)


@dataclass(frozen=True)
class Lookup:
    """One open-addressing table for all columns, as rows.find_slot reads it.

    table int64 [slots] of (key, id + 1); column c's part is table[base[c] : base[c] + mask[c] + 1].
    """

    table: np.ndarray
    base: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """Ids of 26 columns: keys[c] (uint32) in id order, the first one having id `first_id`; counts[c] beside them."""

    first_id: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]

    @property
    def table_sizes(self) -> list[int]:
        """Number of ids per column, id 0 for rare and missing values included where there is one; at least 1."""
        return [max(1, self.first_id + len(keys)) for keys in self.keys]

    def lookup(self) -> Lookup:
        """Build the hash table, at most half full: 8 B a slot."""
        slots = np.array([2 << max(len(keys), 1).bit_length() for keys in self.keys], np.int64)
        base = np.concatenate([[0], np.cumsum(slots)[:-1]])
        table = np.zeros(slots.sum(), np.int64)
        for keys, begin, size in zip(self.keys, base, slots, strict=True):
            fill(table, begin, size - 1, keys, self.first_id + 1)
        return Lookup(table, base, slots - 1)

    def ids(self, keys: list[np.ndarray], preset: Preset) -> tuple[np.ndarray, ...]:
        """For each column the ids int32 [k + 1] of keys uint32 [k], behind that of a missing value (at 0): what build()
        returns beside the vocabulary, of any dictionary's keys."""
        lookup, found = self.lookup(), []
        for c, column in enumerate(keys):
            found.append(np.full(len(column) + 1, preset.rare_id, np.int32))
            _find(lookup.table, lookup.base[c], lookup.mask[c], column, found[-1][1:])
        return tuple(found)

    def popular(self) -> np.ndarray:
        """The id seen most often in each column, int64 [26]; the lowest of several, and 0 where a column has none."""
        most = [int(np.argmax(counts)) if len(counts) else -self.first_id for counts in self.counts]
        return np.array(most) + self.first_id

    def save(self, folder: Path) -> None:
        """Write the id maps as FILE_NAME, arrays C1..C26 (keys in id order) and C1_counts..C26_counts."""
        arrays = {"first_id": np.array(self.first_id)}
        for c in range(SPARSE):
            arrays[f"C{c + 1}"] = self.keys[c]
            arrays[f"C{c + 1}_counts"] = self.counts[c]
        np.savez(folder / FILE_NAME, **arrays)

    @staticmethod
    def load(folder: Path, table_sizes: Sequence[int] | None = None) -> "Vocabulary":
        """Read what save wrote. Takes no more memory than the file has bytes; with table_sizes, a file larger than the
        id maps of such tables is not even opened. Raises DataError where it is missing, damaged or something else."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise DataError(f"{path}: no such file; `python -m gpu_etl encode` writes it beside the data set")
        size = path.stat().st_size
        most = ENTRIES * ENTRY_BYTES + VALUE_BYTES * sum(table_sizes) if table_sizes else size
        if size > most:
            raise DataError(
                f"{path}: {size:,} bytes, where id maps of {sum(table_sizes):,} ids take at most {most:,}; not the id "
                "maps of this data set: encode the days again"
            )
        names = [f"C{c + 1}" for c in range(SPARSE)]
        with npz.Reader(path) as arrays:
            first_id = arrays.read("first_id", np.int64, 0)
            keys = tuple(arrays.read(name, np.uint32, 1) for name in names)
            counts = tuple(arrays.read(f"{name}_counts", np.int64, 1) for name in names)
        return Vocabulary(int(first_id), keys, counts)

    def check(self, first_id: int, table_sizes: list[int], path: Path) -> None:
        """Raise DataError where these are not the id maps of tables of such sizes, whose first id is first_id."""
        if self.first_id != first_id or self.table_sizes != table_sizes:
            raise DataError(
                f"{path}: expected ids from {first_id} on for tables of {table_sizes} rows, got ids from "
                f"{self.first_id} on for {self.table_sizes}; the id maps are another data set's: encode the days again"
            )
        for c, (keys, counts) in enumerate(zip(self.keys, self.counts, strict=True)):
            if len(np.unique(keys)) != len(keys):
                raise DataError(f"{path}: C{c + 1}: expected distinct values, got some twice: encode the days again")
            if len(counts) != len(keys) or (len(counts) and counts.min() < 1):
                raise DataError(
                    f"{path}: C{c + 1}_counts: expected how often each of {len(keys)} values was seen, 1 or more, got "
                    f"{len(counts)} numbers from {counts.min(initial=0)} on: encode the days again"
                )


@compiled
def fill(table, base, mask, keys, first_payload):
    """Enter distinct keys (uint32 [k]) into a hash table of rows.find_slot, with payloads from first_payload on."""
    for i in range(len(keys)):
        key = np.int64(keys[i])
        table[rows.find_slot(table, base, mask, key)] = rows.make_entry(key, first_payload + i)


@compiled
def _find(table, base, mask, keys, ids):
    for i in range(len(keys)):
        payload = rows.entry_payload(table[rows.find_slot(table, base, mask, np.int64(keys[i]))])
        if payload:
            ids[i] = payload - 1


@compiled
def _mark_unseen(values, missing, table, base, mask, missing_is_zero, index_range, unseen):
    for row in range(len(values)):
        for c in range(SPARSE):
            if rows.is_missing(missing[row], FIRST_SPARSE + c) and not missing_is_zero:
                continue
            key = rows.category_key(np.int64(values[row, FIRST_SPARSE + c]), index_range)
            unseen[row, c] = rows.entry_payload(table[np.uint64(rows.find_slot(table, base[c], mask[c], key))]) == 0


def mark_unseen(values: np.ndarray, missing: np.ndarray, lookup: Lookup, preset: Preset) -> np.ndarray:
    """Which category values (uint32 [n, 40], missing uint64 [n]) have no id, bool [n, 26]: never seen, or too rare."""
    unseen = np.zeros((len(values), SPARSE), np.bool_)
    _mark_unseen(
        values, missing, lookup.table, lookup.base, lookup.mask, preset.missing_is_zero, preset.max_index_range, unseen
    )
    return unseen


def build(counts: Counts, preset: Preset) -> tuple[Vocabulary, tuple[np.ndarray, ...]]:
    """Give ids by the preset's rules (see schema.Preset). Depends on the counts only, never on their order.

    Returns the vocabulary, and for each column int32 [k + 1]: the ids of its k values in the order of `counts`, behind
    the id of a missing value (at 0). So a dictionary code of dictionary.py is the place of its id.
    """
    keys, kept_counts, ids = [], [], []
    for column in counts.columns:
        kept = np.flatnonzero(column.counts >= preset.min_count)
        order_by = -column.counts[kept] if preset.order == "count" else column.first_rows[kept]
        kept = kept[np.lexsort((column.keys[kept], order_by))]
        if preset.max_table_size:
            kept = kept[: preset.max_table_size - preset.first_id]
        keys.append(column.keys[kept])
        kept_counts.append(column.counts[kept])
        ids.append(np.full(len(column.keys) + 1, preset.rare_id, np.int32))
        ids[-1][kept + 1] = np.arange(preset.first_id, preset.first_id + len(kept))
    return Vocabulary(preset.first_id, tuple(keys), tuple(kept_counts)), tuple(ids)
