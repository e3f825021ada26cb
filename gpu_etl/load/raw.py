"""Batches straight from a raw day, by the id maps of a data set: for scoring rows that were not encoded."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpu_etl import cpu
from gpu_etl.counting import CODING
from gpu_etl.errors import DataError
from gpu_etl.extract import Slab, TextSlab, open_sources, read_day
from gpu_etl.load.batch import Batch, make_batch
from gpu_etl.load.identity import check_vocabulary
from gpu_etl.manifest import Manifest
from gpu_etl.memory import Reused
from gpu_etl.rows import INT32_MAX
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE, Preset
from gpu_etl.vocabulary import Vocabulary

SLAB_BYTES = 4 << 20
NEWLINE, TAB = b"\n", b"\t"


class RawDay:
    """A day file (text, gzip, zstd, Parquet) in the ids of the data set in `folder`, which `encode` made.

    Text without labels, 39 fields a row as in Kaggle's test.txt, is taken too: `labelled` is False then, labels are 0.
    Raises DataError where the data set has no id maps or others than its manifest tells of, and at the first bad row.
    """

    def __init__(self, folder: Path, path: Path):
        (self._source,) = open_sources([path])
        manifest = Manifest.read(folder)
        check_vocabulary(folder, manifest)
        self._preset = Preset(**manifest.settings["preset"])
        self._lookup = Vocabulary.load(folder).lookup()
        self.labelled = self._has_labels()

    def _slabs(self) -> Iterator[Slab]:
        return read_day(self._source, 0, SLAB_BYTES)

    def _has_labels(self) -> bool:
        slab = next(iter(self._slabs()))
        if not isinstance(slab, TextSlab):
            return True
        return slab.text.tobytes().partition(NEWLINE)[0].count(TAB) != COLUMNS - 2

    def _parsed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """values uint32 [n, 40] and missing uint64 [n] of slab after slab."""
        memory, done = Reused(), 0
        for slab in self._slabs():
            if not self.labelled:
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
            yield as_batch(records).to(device)


def as_batch(records: np.ndarray) -> Batch:
    """Records int32 [n, 40] as a batch on the CPU."""
    dense = records[:, FIRST_DENSE:FIRST_SPARSE].astype(np.float32, order="C")
    sparse = np.ascontiguousarray(records[:, FIRST_SPARSE:])
    columns = dense, sparse, records[:, 0].astype(np.float32)
    return make_batch(*map(torch.from_numpy, columns), logged=False)
