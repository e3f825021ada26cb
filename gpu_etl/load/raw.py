"""Batches straight from a raw day, by the id maps of a data set: for scoring rows that were not encoded."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpu_etl import cpu
from gpu_etl.counting import CODING
from gpu_etl.errors import DataError
from gpu_etl.extract import Slab, TextSlab, open_sources, read_day
from gpu_etl.load.batch import Batch, make_batch
from gpu_etl.load.identity import check_vocabulary
from gpu_etl.manifest import VOCABULARY, Manifest
from gpu_etl.memory import Reused
from gpu_etl.rows import INT32_MAX
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, FIRST_DENSE, FIRST_SPARSE, SPARSE
from gpu_etl.vocabulary import Vocabulary, mark_unseen

SLAB_BYTES = 4 << 20
UNSEEN_RULES = ("rare", "popular", "error")
NEWLINE, TAB = b"\n", b"\t"


class RawDay:
    """A day file (text, gzip, zstd, Parquet) in the ids of the data set in `folder`, which `encode` made.

    Rows without labels, 39 fields or columns as in Kaggle's test.txt, are taken too: `labelled` is False then, labels
    are 0. unseen: what becomes of category values that have no id, as that data set never showed them, or too seldom:
    "rare", the preset's id for rare values, which is the first value's where it has none (mlperf); "popular", the
    column's most frequent id; "error". unseen_values: how many there were so far, int64 [26].

    Raises DataError where the data set has no id maps or others than its manifest tells of, and at the first bad row.
    """

    def __init__(self, folder: Path, path: Path, unseen: str = "rare"):
        if unseen not in UNSEEN_RULES:
            raise DataError(f"--unseen: expected one of {', '.join(UNSEEN_RULES)}, got {unseen!r}")
        self._unseen, self.unseen_values, self.rows = unseen, np.zeros(SPARSE, np.int64), 0
        (self._source,) = open_sources([path])
        manifest = Manifest.read(folder)
        check_vocabulary(folder, manifest)
        self._preset = manifest.preset()
        words = Vocabulary.load(folder, manifest.table_sizes)
        words.check(self._preset.first_id, manifest.table_sizes, Path(folder) / VOCABULARY)
        self._lookup, self._popular = words.lookup(), words.popular()
        self.labelled = self._has_labels()

    def _slabs(self) -> Iterator[Slab]:
        return read_day(replace(self._source), 0, SLAB_BYTES, label_optional=True)  # a new one counts from 0

    def _has_labels(self) -> bool:
        slab = next(iter(self._slabs()))
        if not isinstance(slab, TextSlab):
            return slab.labelled
        return slab.text.tobytes().partition(NEWLINE)[0].count(TAB) != COLUMNS - 2

    def _parsed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """values uint32 [n, 40] and missing uint64 [n] of slab after slab."""
        memory, done = Reused(), 0
        for slab in self._slabs():
            if not self.labelled and isinstance(slab, TextSlab):
                text = b"0\t" + slab.text.tobytes().removesuffix(NEWLINE).replace(NEWLINE, b"\n0\t")
                slab = TextSlab(slab.day, slab.end, np.frombuffer(text, np.uint8), slab.pool)
            slab.prepare(cpu)
            values, missing, faults = slab.parse(cpu, memory)
            if faults.any():
                row = int(np.flatnonzero(faults)[0])
                raise DataError(f"{self._source.path}: row {done + row + 1}: {slab.describe(row, faults[row])}")
            done += len(values)
            yield values, missing

    def _shift(self) -> tuple[int, int]:
        """How integers are encoded (rows.dense_value); by the rule "min", it takes a look at all of them."""
        if self._preset.dense in CODING:
            return CODING[self._preset.dense]
        least = min(int(values[:, FIRST_DENSE:FIRST_SPARSE].view(np.int32).min()) for values, _ in self._parsed())
        return 1 - least, min(1 - least, INT32_MAX)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """All rows in order, some thousands a batch."""
        shift, empty_value = self._shift()
        for values, missing in self._parsed():
            records = cpu.encode(values, missing, self._lookup, self._preset, shift, empty_value)
            self._settle_unseen(records, values, missing)
            self.rows += len(records)
            yield as_batch(records).to(device)

    def _settle_unseen(self, records: np.ndarray, values: np.ndarray, missing: np.ndarray) -> None:
        """Count the values that have no id, and do about them what the rule says, in the records int32 [n, 40]."""
        unseen = mark_unseen(values, missing, self._lookup, self._preset)
        self.unseen_values += unseen.sum(0)
        if self._unseen == "error" and unseen.any():
            row, c = np.argwhere(unseen)[0]
            raise DataError(
                f"{self._source.path}: row {self.rows + row + 1}: column {COLUMN_NAMES[FIRST_SPARSE + c]}: the value "
                f"{values[row, FIRST_SPARSE + c]:08x} has no id in the data set's vocabulary; --unseen rare or popular "
                "gives such values another's id"
            )
        if self._unseen == "popular":
            np.copyto(records[:, FIRST_SPARSE:], self._popular.astype(np.int32), where=unseen)

    def unseen_report(self) -> dict[str, int]:
        """How many category values of each column had no id so far, without the columns where all had one."""
        names = COLUMN_NAMES[FIRST_SPARSE:]
        return {name: int(count) for name, count in zip(names, self.unseen_values, strict=True) if count}

    def unseen_words(self) -> str:
        """The same in words, with what they became."""
        total = int(self.unseen_values.sum())
        if not total:
            return "all category values have ids in the data set's vocabulary"
        became = {"popular": "the most frequent id of their column", "rare": f"id {self._preset.rare_id}"}[self._unseen]
        if self._unseen == "rare" and self._preset.rare_id >= self._preset.first_id:
            became += ", which is an ordinary value's in this data set (see --unseen)"
        return f"{total:,} of {self.rows * SPARSE:,} category values have no id in the data set: they became {became}"


def as_batch(records: np.ndarray) -> Batch:
    """Records int32 [n, 40] as a batch on the CPU."""
    dense = records[:, FIRST_DENSE:FIRST_SPARSE].astype(np.float32, order="C")
    sparse = np.ascontiguousarray(records[:, FIRST_SPARSE:])
    columns = dense, sparse, records[:, 0].astype(np.float32)
    return make_batch(*map(torch.from_numpy, columns), logged=False)
