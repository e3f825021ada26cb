"""The encode pass: coded rows -> records -> the splits' files, from where an earlier run stopped."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpu_etl import formats
from gpu_etl.journal import Journal
from gpu_etl.memory import Reused
from gpu_etl.prefetch import OneBehind, prefetch
from gpu_etl.rows import INT32_MAX
from gpu_etl.schema import COLUMNS, RECORD_DTYPE, Preset
from gpu_etl.shuffle import Buckets, group
from gpu_etl.spill import Spill, first_number

SCATTER_ROWS = 1 << 15


def day_shifts(smallest: list[int], preset: Preset) -> np.ndarray:
    """What is added to each day's coded integers, int64 [days]; smallest: each day's smallest integer."""
    if preset.dense == "min":
        return np.array([1 - min(least, INT32_MAX) for least in smallest])
    return np.zeros(len(smallest), np.int64)


class Piece(NamedTuple):
    """Rows begin to end of a day (or of a part of one); row: the place of the first among the rows asked for."""

    day: int
    begin: int
    end: int
    row: int


def pieces(day_rows: list[int], begin: int, end: int, most: int) -> Iterator[Piece]:
    """The rows begin to end of all days in file order, at most `most` at a time, cut where a day ends."""
    first = 0
    for day, rows in enumerate(day_rows):
        for start in range(max(begin - first, 0), min(end - first, rows), most):
            yield Piece(day, start, min(start + most, end - first, rows), first + start - begin)
        first += rows


class EncodePass:
    """Runs the pass: run() once a split. Everything is written in the folder `work`.

    day_rows, shifts: of each day, its rows and what is added to their integers. ids: 26 arrays int32, id by code.
    """

    def __init__(
        self, kernels: ModuleType, spill: Spill, buckets: Buckets, day_rows: list[int], shifts: np.ndarray,
        ids: tuple[np.ndarray, ...], table_sizes: list[int], form: str, journal: Journal, work: Path,
    ):  # fmt: skip
        self._kernels, self._finisher = kernels, kernels.Finisher(ids, shifts)
        self._spill, self._buckets = spill, buckets
        self._day_rows = day_rows
        self._table_sizes, self._form, self._journal, self._work = table_sizes, form, journal, work
        self._memory = Reused(kernels.host_bytes), Reused(kernels.host_bytes)
        self._turn = 0

    def run(self, split: str, begin: int, end: int, shuffled: bool) -> None:
        """Write the split of rows begin to end of all days; shuffled: those in the buckets, which are the same rows.

        Afterwards the journal has an event "split" with the files' sizes and checksums.
        """
        with tqdm(total=end - begin, unit="rows", unit_scale=True, desc=f"encode {split:5}", file=sys.stderr) as bar:
            files = self._write_shuffled(split, bar) if shuffled else self._write_in_order(split, begin, end, bar)
        self._journal.record(split={"name": split, "files": files})

    def _write_in_order(self, split: str, begin: int, end: int, bar: tqdm) -> dict:
        done = min(formats.rows_written(self._form, self._work, split, self._table_sizes), end - begin)
        bar.update(done)
        blocks = (
            (piece.day, self._spill.read(piece.day, piece.begin, piece.end))
            for piece in pieces(self._day_rows, begin + done, end, self._kernels.ENCODE_ROWS)
        )
        with formats.SplitWriter(self._form, self._work, split, self._table_sizes, done) as writer:
            with OneBehind(self._kernels.enter_thread) as writing:
                for day, coded in prefetch(blocks, initializer=self._kernels.enter_thread):
                    self._finisher.take(coded, day)
                    finished = self._finish(0, len(coded), bar)
                    writing.submit(lambda finished=finished: writer.write(finished()))
            return writer.described()

    def _write_shuffled(self, split: str, bar: tqdm) -> dict:
        gathered = self._journal.all("gathered")
        for bucket in range(len(gathered)):
            self._buckets.remove(bucket)
        done = sum(bucket["rows"] for bucket in gathered)
        bar.update(done)

        def store(finished: Callable[[], np.ndarray], bucket: int, rows: int | None) -> None:
            """Write records; rows: of the whole bucket, where these are its last."""
            writer.write(finished())
            if rows is not None:
                self._journal.record(gathered={"bucket": bucket, "rows": rows})
                self._buckets.remove(bucket)

        kernels, step = self._kernels, self._kernels.ENCODE_ROWS
        memory = [Reused(kernels.host_bytes) for _ in range(3)]
        buckets = self._buckets.whole(len(gathered), memory, kernels.enter_thread)
        with formats.SplitWriter(self._form, self._work, split, self._table_sizes, done) as writer:
            with OneBehind(kernels.enter_thread) as writing:
                for bucket, numbered in enumerate(buckets, len(gathered)):
                    rows = len(numbered)
                    memory[bucket % len(memory)].hold(self._finisher.take_shuffled(numbered, self._buckets.seed))
                    for begin in range(0, max(1, rows), step):
                        finished = self._finish(begin, min(begin + step, rows), bar)
                        writing.submit(store, finished, bucket, rows if begin + step >= rows else None)
            return writer.described()

    def _finish(self, begin: int, end: int, bar: tqdm) -> Callable[[], np.ndarray]:
        """What gives some records, in memory that is used again two calls later."""
        self._turn ^= 1
        records = self._memory[self._turn].empty((end - begin, COLUMNS), RECORD_DTYPE)
        bar.update(end - begin)
        return self._finisher.finish(begin, end, records)


def scatter(
    spill: Spill, buckets: Buckets, day_rows: list[int], begin: int, end: int, journal: Journal
) -> None:
    """Bring the rows begin to end of all days from the spill into the buckets, from where an earlier run stopped."""
    memory = Reused()
    done = sum(event["rows"] for event in journal.all("scattered"))
    for piece in pieces(day_rows, begin + done, end, SCATTER_ROWS):
        coded = spill.read(piece.day, piece.begin, piece.end)
        first = first_number(piece.day) + piece.begin
        buckets.add(*group(coded, first, buckets.seed, len(buckets), memory))
        journal.record(scattered={"day": piece.day, "rows": len(coded)})
