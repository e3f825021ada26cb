"""Batches straight from a raw day, by the id maps of a data set: for scoring rows that were not encoded."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError
from gpu_etl.dataset.manifest import VOCABULARY, Manifest
from gpu_etl.load.batch import Batch, make_batch
from gpu_etl.load.identity import check_vocabulary
from gpu_etl.passes.bad_rows import BadRows
from gpu_etl.passes.count import CODING
from gpu_etl.raw.reader import open_sources, read_day
from gpu_etl.raw.source import Slab
from gpu_etl.raw.text import TextSlab
from gpu_etl.rows.scalar import INT32_MAX
from gpu_etl.rows.vocabulary import Vocabulary, mark_unseen
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, FIRST_DENSE, FIRST_SPARSE, SPARSE

SLAB_BYTES = 4 << 20
UNSEEN_RULES = ("rare", "popular", "error")
NEWLINE, TAB = b"\n", b"\t"
LOOKED_AT = 1 << 16  # bytes, to see whether rows have a label


STRICT = BadRows("error")


class RawDay:
    """A day file (text, gzip, zstd, Parquet) in the ids of the data set in `folder`, which `encode` made.

    Rows without labels, 39 fields or columns as in Kaggle's test.txt, are taken too: `labelled` is False then, labels
    are 0. unseen: what becomes of category values that have no id, as that data set never showed them, or too seldom:
    "rare", the preset's id for rare values, which is the first value's where it has none (mlperf); "popular", the
    column's most frequent id; "error". unseen_values: how many there were so far, int64 [26].

    bad_rows: what becomes of rows that cannot be parsed. Where they are skipped, `dropped` tells how many there were so
    far by reason, and bad_row_numbers which, from 1: the batches have the others.

    Raises DataError where the data set has no id maps or others than its manifest tells of, and BadRowError by the rule
    for bad rows.
    """

    def __init__(self, folder: Path, path: Path, unseen: str = "rare", bad_rows: BadRows = STRICT):
        if unseen not in UNSEEN_RULES:
            raise DataError(f"--unseen: expected one of {', '.join(UNSEEN_RULES)}, got {unseen!r}")
        bad_rows.check()
        self._unseen, self.unseen_values, self.rows = unseen, np.zeros(SPARSE, np.int64), 0
        self._bad_rows, self.dropped, self.bad_row_numbers = bad_rows, Counter(), []
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
        """By the first row of as many fields as a row has with a label, or without."""
        slab = next(iter(self._slabs()), None)
        if not isinstance(slab, TextSlab):
            return slab is None or slab.labelled
        for line in slab.text[:LOOKED_AT].tobytes().split(NEWLINE):
            if line.count(TAB) in (COLUMNS - 1, COLUMNS - 2):
                return line.count(TAB) == COLUMNS - 1
        return True

    def _parsed(self, tell: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """values uint32 [n, 40] and missing uint64 [n] of the good rows of slab after slab.

        tell: whether bad rows are told of and counted, as where the file is read for the last time.
        """
        memory, done, dropped = ScratchBuffer(), 0, Counter()
        for slab in self._slabs():
            if not self.labelled and isinstance(slab, TextSlab):
                slab = _UnlabelledSlab.of(slab)
            slab.prepare(cpu)
            while slab is not None:
                values, missing, faults = slab.parse(cpu, memory)
                new = self._bad_rows.settle(
                    slab, faults, where=lambda row, done=done: f"{self._source.path}: row {done + row + 1}",
                    before=dropped.total(), **({} if tell else {"say": lambda words: None}),
                )  # fmt: skip
                dropped.update(new)
                if new and tell:
                    self.dropped.update(new)
                    self.bad_row_numbers += (np.flatnonzero(faults) + done + 1).tolist()
                done += len(faults)
                yield cpu.keep_rows(values, missing, faults == 0) if new else (values, missing)
                slab = slab.rest(cpu)

    def _shift(self) -> tuple[int, int]:
        """How integers are encoded (rows.dense_value); by the rule "min", it takes a look at all of them."""
        if self._preset.dense in CODING:
            return CODING[self._preset.dense]
        least = INT32_MAX
        for values, _ in self._parsed(tell=False):
            integers = values[:, FIRST_DENSE:FIRST_SPARSE].view(np.int32)
            least = min(least, int(integers.min(initial=INT32_MAX)))
        return 1 - least, min(1 - least, INT32_MAX)

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """All rows in order, some thousands a batch."""
        shift, empty_value = self._shift()
        for values, missing in self._parsed():
            if not len(values):
                continue
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
            name, number = COLUMN_NAMES[FIRST_SPARSE + c], self._number(self.rows + row + 1)
            raise DataError(
                f"{self._source.path}: row {number}: column {name}: the value "
                f"{values[row, FIRST_SPARSE + c]:08x} has no id in the data set's vocabulary; --unseen rare or popular "
                "gives such values another's id"
            )
        if self._unseen == "popular":
            np.copyto(records[:, FIRST_SPARSE:], self._popular.astype(np.int32), where=unseen)

    def _number(self, row: int) -> int:
        """The number in the file of a row that has the number `row` among those that are not left out."""
        for bad in self.bad_row_numbers:
            row += bad <= row
        return row

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


class _UnlabelledSlab(TextSlab):
    """Text without labels, a label of 0 put before each row; the words for a row are those of the row as it was."""

    labelled = False

    @classmethod
    def of(cls, slab: TextSlab) -> "_UnlabelledSlab":
        """The slab with labels."""
        text = b"0\t" + slab.text.tobytes().removesuffix(NEWLINE).replace(NEWLINE, b"\n0\t")
        return cls(slab.day, slab.end, np.frombuffer(text, np.uint8), slab.pool)


def as_batch(records: np.ndarray) -> Batch:
    """Records int32 [n, 40] as a batch on the CPU."""
    dense = records[:, FIRST_DENSE:FIRST_SPARSE].astype(np.float32, order="C")
    sparse = np.ascontiguousarray(records[:, FIRST_SPARSE:])
    columns = dense, sparse, records[:, 0].astype(np.float32)
    return make_batch(*map(torch.from_numpy, columns), logged=False)
