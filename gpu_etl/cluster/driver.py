"""Both passes over several processes, as Dask tasks: a part of the days is counted by one, a range of rows encoded.

All workers see the same folders. A part's work lies in a folder of its own, with a journal, so the task of a worker
that died goes on elsewhere where it was. Counts are merged as a tree; each task of the encode pass writes its own range
of the final files, whose checksums are taken meanwhile. The bytes are those of one process.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpu_etl.cluster import byte_ranges as parts, shared_files, watch as cluster_watch
from gpu_etl.cluster.byte_ranges import CountTask
from gpu_etl.cluster.check import Check
from gpu_etl.cluster.start import connect
from gpu_etl.cluster.tasks import (
    CODE_DIGEST,
    COUNTS,
    checked,
    count_part,
    encode_bucket,
    encode_rows,
    load_counts,
    merge_counts,
    number_part,
)
from gpu_etl.cluster.watch import Call, WorkerMonitor, ask
from gpu_etl.common.errors import BadRowError
from gpu_etl.common.threads import BackgroundWorker
from gpu_etl.dataset import formats, manifest
from gpu_etl.passes import integrity
from gpu_etl.passes.encode import day_shifts, pieces
from gpu_etl.passes.settings import Settings
from gpu_etl.raw.source import Source
from gpu_etl.rows import vocabulary
from gpu_etl.rows.statistics import DayStatistics

TASK_ROWS = 1 << 17
CLOSE_SECONDS = 10.0


class Cluster:
    """Runs the tasks; for use in `with`. buckets: of the shuffle.

    Raises DataError where no scheduler answers or a worker cannot do the work, and KeepWorkError where nothing is heard
    of the cluster any more.
    """

    def __init__(self, sources: list[Source], settings: Settings, work: Path, buckets: int):
        self._sources = [_resolved(source) for source in sources]
        if settings.workers and not settings.threads:
            settings = replace(settings, threads=max(1, (os.cpu_count() or 1) // settings.workers))
        self._settings, self._work, self._buckets = settings, work.resolve(), buckets

    def __enter__(self) -> "Cluster":
        self._client, self._local = connect(self._settings)
        try:
            known = Check(self._client, self._sources, self._settings, self._work).run()
            self._watch = WorkerMonitor(self._client, self._settings.worker_timeout, self._work, known)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def _close(self) -> None:
        for ending in filter(None, (self._client, self._local)):
            try:
                ending.close(timeout=CLOSE_SECONDS)
            except (OSError, RuntimeError) as error:  # a TimeoutError is an OSError; what was asked for is done
                print(f"Dask did not end in order ({type(error).__name__}: {error})", file=sys.stderr)

    def _run(self, name: str, calls: list[Call], done: Callable[[int], None] = lambda place: None) -> list:
        """Results of calls of tasks, in order; done(place) is told of each. The first error ends it all."""
        calls = [(checked, (CODE_DIGEST, self._work, *call)) for call in calls]
        return cluster_watch.run(self._client, self._watch, name, calls, done)

    def _cut(self) -> list[CountTask]:
        """The parts, with the numbers of their first rows, which take a look at all bytes before a part's."""
        scheduler = self._client.scheduler
        workers = self._settings.workers or ask(self._client, lambda: scheduler.identity(n_workers=-1))["n_workers"]
        ranges = parts.cut(self._sources, self._settings, max(1, workers))
        ahead = [
            i for i, this in enumerate(ranges[:-1]) if ranges[i + 1].day == this.day
        ]  # the last part of a day is ahead of none
        paths = {i: self._sources[ranges[i].day].files[ranges[i].file].path for i in ahead}
        calls = [(parts.count_rows, (paths[i], ranges[i].begin, ranges[i].end)) for i in ahead]
        rows = dict(zip(ahead, self._run("find rows", calls), strict=True)) if calls else {}
        found: list[CountTask] = []
        for number, this in enumerate(ranges):
            first = found[-1].first_row + rows[number - 1] if number - 1 in rows else 0
            found.append(CountTask(number, *this, first, found[-1].file_row if this.begin else first))
        parts.save(found, self._work)
        return found

    def count(self) -> list[DayStatistics]:
        """The count pass; returns a tally a day."""
        self._parts = parts.load(self._work) or self._cut()
        common = self._settings, self._work, self._buckets
        found = self._run("count", [(count_part, (self._sources, part, *common)) for part in self._parts])
        self._tallies, self._bucket_rows = [tally for tally, _, _ in found], [rows for _, rows, _ in found]
        self._rows_sum = integrity.add(*(rows_sum for _, _, rows_sum in found))
        limit = self._settings.max_bad_rows
        bad = sum(tally.bad_rows() for tally in self._tallies)
        if bad > limit:
            raise BadRowError(f"{bad} bad rows in all days, more than --max-bad-rows {limit}")
        self._days = parts.by_day(self._parts, self._tallies, len(self._sources))
        return self._days

    def number(self) -> tuple[list[int], list[int]]:
        """Merge the counts and give ids; returns the table sizes, and the distinct values a column."""
        folders = [part.folder(self._work) for part in self._parts]
        level = [folder / COUNTS for folder in folders]
        while len(level) > 1:
            pairs = list(zip(level[::2], level[1::2], strict=False))
            outs = [self._work / f"merged_{len(level)}_{i}.npz" for i in range(len(pairs))]
            calls = [(merge_counts, (*pair, out)) for pair, out in zip(pairs, outs, strict=True)]
            level = self._run("merge", calls) + level[2 * len(pairs) :]
        counts = load_counts(level[0])
        words, _ = vocabulary.build(counts, self._settings.preset)
        words.save(self._work)
        self._table_sizes = words.table_sizes
        self._run("number", [(number_part, (folder, self._settings.preset, self._work)) for folder in folders])
        return words.table_sizes, [len(column.keys) for column in counts.columns]

    def encode(self, ranges: dict[str, tuple[int, int]]) -> dict[str, dict]:
        """The encode pass; returns the manifest's entries of the files.

        Raises WorkDamagedError where the rows that went into the splits are not those that were counted.
        """
        form, work, sizes = self._settings.form, self._work, self._table_sizes
        self._shifts = day_shifts([tally.smallest for tally in self._days], self._settings.preset).tolist()
        calls = {split: list(self._calls(split, *ranges[split])) for split in ranges}
        with ExitStack() as opened:
            sums = {}
            for split, (begin, end) in ranges.items():
                shared_files.allocate(form, work, split, sizes, end - begin)
                sums[split] = opened.enter_context(shared_files.Sums(form, work, split, sizes))
            with BackgroundWorker() as summing:
                front = _Front(calls, lambda split, row: summing.submit(sums[split].take, row))
                found = self._run("encode", [call for some in calls.values() for call, _ in some], front.done)
                integrity.expect(integrity.add(*found), self._rows_sum, work, "the coded rows of all splits")
            files = {name: entry for split in ranges for name, entry in sums[split].described().items()}
        names = vocabulary.FILE_NAME, *formats.write_extra_files(form, work, sizes)
        return files | {name: manifest.describe_file(work / name) for name in names}

    def _calls(self, split: str, begin: int, end: int) -> Iterator[tuple[Call, int]]:
        """What writes the rows begin to end of all days into a split, in the order of its rows: calls, and the row of
        the split behind each."""
        common = self._table_sizes, self._settings, self._work
        inside = self._settings.to_buckets(len(self._sources))
        if split == "train" and any(inside):
            training = [part for part in self._parts if inside[part.day]]
            folders = [(part.folder(self._work), self._shifts[part.day]) for part in training]
            rows = np.sum([self._bucket_rows[part.number] for part in training], axis=0, dtype=np.int64)
            for bucket, (row, count) in enumerate(zip(np.cumsum(rows) - rows, rows, strict=True)):
                arguments = split, int(row), int(count), bucket, self._buckets, folders, *common
                yield (encode_bucket, arguments), int(row + count)
            return
        for piece in pieces([tally.kept for tally in self._tallies], begin, end, TASK_ROWS):
            part = self._parts[piece.day]
            arguments = split, piece.row, piece.begin, piece.end, part, self._shifts[part.day], *common
            yield (encode_rows, arguments), piece.row + piece.end - piece.begin


def _resolved(source: Source) -> Source:
    """The source by its full paths, wherever a worker runs."""
    return replace(source, path=source.path.resolve(), parts=tuple(map(_resolved, source.parts)))


class _Front:
    """How far the rows of each split are written from the front on, where calls end in any order.

    calls: of each split, in the order of its rows, with the row behind each; advanced(split, row): called when the rows
    before `row` are all written.
    """

    def __init__(self, calls: dict[str, list[tuple[Call, int]]], advanced: Callable[[str, int], None]):
        self._advanced, self._done = advanced, set()
        self._splits = [split for split, some in calls.items() for _ in some]
        places = iter(range(len(self._splits)))
        self._waiting = {split: deque((next(places), end) for _, end in some) for split, some in calls.items()}

    def done(self, place: int) -> None:
        """The call at this place of all is done."""
        self._done.add(place)
        split, row = self._splits[place], None
        waiting = self._waiting[split]
        while waiting and waiting[0][0] in self._done:
            row = waiting.popleft()[1]
        if row is not None:
            self._advanced(split, row)
