"""The encode pass: the spill's rows -> records -> the splits' files, from where an earlier run stopped."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from gpu_etl import formats
from gpu_etl.journal import Journal
from gpu_etl.prefetch import prefetch
from gpu_etl.rows import INT32_MAX
from gpu_etl.schema import Preset
from gpu_etl.shuffle import BUCKET_BYTES, Shuffler
from gpu_etl.spill import Spill
from gpu_etl.vocabulary import Vocabulary

ENCODE_ROWS = 1 << 15


@dataclass(frozen=True)
class Segment:
    """Rows begin to end come from one day file; its integers take shift and empty_value (rows.dense_value)."""

    begin: int
    end: int
    shift: int
    empty_value: int


def segments(day_rows: list[int], smallest: list[int], preset: Preset) -> list[Segment]:
    """How each day file's integers are encoded by the preset's rule; smallest: each file's smallest integer."""
    found, begin = [], 0
    for rows, least in zip(day_rows, smallest, strict=True):
        shift = {"clamp": 0, "plus2": 2, "min": 1 - least}[preset.dense]
        empty_value = min(shift, INT32_MAX) if preset.dense == "min" else 0
        found.append(Segment(begin, begin + rows, shift, empty_value))
        begin += rows
    return found


class EncodePass:
    """Runs the pass: run() once a split. Everything is written in the folder `work`."""

    def __init__(
        self, kernels: ModuleType, spill: Spill, words: Vocabulary, preset: Preset, parts: list[Segment], form: str,
        journal: Journal, work: Path,
    ):  # fmt: skip
        self._kernels, self._spill, self._lookup, self._preset = kernels, spill, words.lookup(), preset
        self._parts, self._form, self._table_sizes = parts, form, words.table_sizes
        self._journal, self._work = journal, work

    def _encoded(self, begin: int, end: int, bar: tqdm) -> Iterator[np.ndarray]:
        """Records of the rows begin to end, ENCODE_ROWS at a time."""
        for pieces in prefetch(self._read(begin, end)):
            blocks = [
                self._kernels.encode(values, missing, self._lookup, self._preset, part.shift, part.empty_value)
                for part, values, missing in pieces
            ]
            records = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
            yield records
            bar.update(len(records))

    def _read(self, begin: int, end: int) -> Iterator[list[tuple[Segment, np.ndarray, np.ndarray]]]:
        """The spilled rows begin to end, ENCODE_ROWS at a time, cut where a day file ends."""
        for start in range(begin, end, ENCODE_ROWS):
            stop = min(start + ENCODE_ROWS, end)
            inside = [part for part in self._parts if part.begin < stop and start < part.end]
            yield [(part, *self._spill.read(max(start, part.begin), min(stop, part.end))) for part in inside]

    def run(self, split: str, begin: int, end: int, shuffle_seed: int | None) -> None:
        """Write the split of rows begin to end; shuffled, unless the seed is None."""
        with tqdm(total=end - begin, unit="rows", unit_scale=True, desc=f"encode {split:5}", file=sys.stderr) as bar:
            if shuffle_seed is None:
                done = min(formats.rows_written(self._form, self._work, split, self._table_sizes), end - begin)
                bar.update(done)
                with self._writer(split, done) as writer:
                    for records in self._encoded(begin + done, end, bar):
                        writer.write(records)
            else:
                self._run_shuffled(split, begin, end, shuffle_seed, bar)

    def _run_shuffled(self, split: str, begin: int, end: int, seed: int, bar: tqdm) -> None:
        scattered = self._journal.all("scattered")
        shuffler = Shuffler(self._work, end - begin, seed, ENCODE_ROWS, bool(scattered), BUCKET_BYTES)
        bar.update(shuffler.taken)
        if not scattered:
            for records in self._encoded(begin + shuffler.taken, end, bar):
                shuffler.add(records)
            self._journal.record(scattered=True)
        buckets = self._journal.all("gathered")
        done = sum(bucket["rows"] for bucket in buckets)
        for bucket in range(len(buckets)):
            shuffler.remove(bucket)
        with self._writer(split, done) as writer:
            for bucket, records in enumerate(shuffler.shuffled(len(buckets)), len(buckets)):
                writer.write(records)
                self._journal.record(gathered={"bucket": bucket, "rows": len(records)})
                shuffler.remove(bucket)

    def _writer(self, split: str, done: int) -> formats.SplitWriter:
        return formats.SplitWriter(self._form, self._work, split, self._table_sizes, done)
