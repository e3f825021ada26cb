"""The encode pass: coded rows -> records -> the splits' files, from where an earlier run stopped."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import WorkDamagedError
from gpu_etl.common.threads import BackgroundWorker, prefetch
from gpu_etl.dataset import formats
from gpu_etl.passes import integrity
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.coded_rows import Spill
from gpu_etl.passes.journal import Journal
from gpu_etl.rows.numbered import first_number, group
from gpu_etl.rows.scalar import INT32_MAX
from gpu_etl.schema import COLUMNS, RECORD_DTYPE, Preset

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
        self._memory = ScratchBuffer(kernels.host_bytes), ScratchBuffer(kernels.host_bytes)
        self._turn = 0

    def run(self, split: str, begin: int, end: int, shuffled: bool) -> None:
        """Write the split of rows begin to end of all days; shuffled: those in the buckets, which are the same rows.

        Afterwards the journal has an event "split" with the files' sizes and checksums, and the sum of the digests of
        the coded rows that went into them. Raises WorkDamagedError where rows, or what an earlier run wrote of the
        split, are not what the journal says.
        """
        with tqdm(total=end - begin, unit="rows", unit_scale=True, desc=f"encode {split:5}", file=sys.stderr) as bar:
            write = self._write_shuffled if shuffled else self._write_in_order
            files, rows_sum = write(split, begin, end, bar)
        self._journal.record(split={"name": split, "files": files, "sum": rows_sum})

    def _writer(self, split: str, done: int, digest: str | None) -> formats.SplitWriter:
        """What goes on behind the rows that an earlier run wrote, if they are those that it wrote."""
        writer = formats.SplitWriter(self._form, self._work, split, self._table_sizes, done, self._buckets.crew)
        try:
            if done:
                integrity.expect(writer.digest(), digest, self._work, f"the first {done} rows of the split {split!r}")
        except BaseException:
            writer.close()
            raise
        return writer

    def _written(self, split: str, rows: int) -> dict:
        """How far an earlier run came with a split in file order: rows done, of how many, their sum, their digest."""
        found = [event for event in self._journal.all("written") if event["split"] == split and event["of"] == rows]
        return found[-1] if found else {"split": split, "of": rows, "rows": 0, "sum": 0, "digest": None}

    def _write_in_order(self, split: str, begin: int, end: int, bar: tqdm) -> tuple[dict, int]:
        state = self._written(split, end - begin)
        try:
            opened = self._writer(split, state["rows"], state["digest"])
        except WorkDamagedError as error:
            print(f"{error}; the split {split!r} is written anew", file=sys.stderr)
            state.update(rows=0, sum=0)
            opened = self._writer(split, 0, None)
        bar.update(state["rows"])
        blocks = (
            (piece, self._spill.read(piece.day, piece.begin, piece.end))
            for piece in pieces(self._day_rows, begin + state["rows"], end, self._kernels.ENCODE_ROWS)
        )

        def store(finished: Callable[[], np.ndarray], found: int) -> None:
            records = finished()
            writer.write(records)
            state.update(
                rows=state["rows"] + len(records), sum=integrity.add(state["sum"], found), digest=writer.digest()
            )
            self._journal.record(written=dict(state))

        with opened as writer:
            with BackgroundWorker(self._kernels.enter_thread) as writing:
                for piece, coded in prefetch(blocks, initializer=self._kernels.enter_thread):
                    self._finisher.take(coded, piece.day)
                    found = integrity.rows_sum(coded, first_number(piece.day) + piece.begin)
                    writing.submit(store, self._finish(0, len(coded), bar), found)
            return writer.described(), state["sum"]

    def _write_shuffled(self, split: str, begin: int, end: int, bar: tqdm) -> tuple[dict, int]:
        gathered = self._journal.all("gathered")
        for bucket in range(len(gathered)):
            self._buckets.remove(bucket)
        done = sum(bucket["rows"] for bucket in gathered)
        bar.update(done)

        def store(finished: Callable[[], np.ndarray], bucket: int, rows: int | None) -> None:
            """Write records; rows: of the whole bucket, where these are its last."""
            writer.write(finished())
            if rows is not None:
                self._journal.record(gathered={"bucket": bucket, "rows": rows, "digest": writer.digest()})
                self._buckets.remove(bucket)

        kernels, step = self._kernels, self._kernels.ENCODE_ROWS
        memory = [ScratchBuffer(kernels.host_bytes) for _ in range(3)]
        buckets = self._buckets.whole(len(gathered), memory, kernels.enter_thread)
        with self._writer(split, done, gathered[-1]["digest"] if gathered else None) as writer:
            with BackgroundWorker(kernels.enter_thread) as writing:
                for bucket, numbered in enumerate(buckets, len(gathered)):
                    found, where = integrity.numbered_sum(numbered), self._buckets.paths[bucket]
                    integrity.expect(found, int(self._buckets.sums[bucket]), where, "the coded rows")
                    rows = len(numbered)
                    memory[bucket % len(memory)].hold(self._finisher.take_shuffled(numbered, self._buckets.seed))
                    for begin in range(0, max(1, rows), step):
                        finished = self._finish(begin, min(begin + step, rows), bar)
                        writing.submit(store, finished, bucket, rows if begin + step >= rows else None)
            return writer.described(), integrity.add(*self._buckets.sums.tolist())

    def _finish(self, begin: int, end: int, bar: tqdm) -> Callable[[], np.ndarray]:
        """What gives some records, in memory that is used again two calls later."""
        self._turn ^= 1
        records = self._memory[self._turn].empty((end - begin, COLUMNS), RECORD_DTYPE)
        bar.update(end - begin)
        return self._finisher.finish(begin, end, records)


def scatter(spill: Spill, buckets: Buckets, day_rows: list[int], begin: int, end: int, journal: Journal) -> None:
    """Bring the rows begin to end of all days from the spill into the buckets, from where an earlier run stopped.

    Afterwards the journal has an event "bucket_sums". Raises WorkDamagedError where the buckets hold other rows than
    that run brought there.
    """
    memory = ScratchBuffer()
    for _ in integrity.rows_of(buckets):
        pass
    before = integrity.add(*(event["sum"] for event in journal.all("scattered")))
    integrity.expect(integrity.add(*buckets.sums.tolist()), before, spill.folder, "the rows in the shuffle's buckets")
    done = sum(event["rows"] for event in journal.all("scattered"))
    for piece in pieces(day_rows, begin + done, end, SCATTER_ROWS):
        coded = spill.read(piece.day, piece.begin, piece.end)
        first = first_number(piece.day) + piece.begin
        numbered, ends = group(coded, first, buckets.seed, len(buckets), memory)
        buckets.add(numbered, ends)
        found = integrity.add_to_buckets(numbered, ends, buckets.sums)
        journal.record(scattered={"day": piece.day, "rows": len(coded), "sum": found})
    journal.record(bucket_sums=buckets.sums.tolist())
