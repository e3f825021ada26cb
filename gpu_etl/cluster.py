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
from dask.distributed import Client, LocalCluster, as_completed
from tqdm import tqdm

from gpu_etl import formats, integrity, manifest, parts, shared_files, vocabulary
from gpu_etl.cluster_tasks import (
    COUNTS,
    count_part,
    encode_bucket,
    encode_rows,
    load_counts,
    merge_counts,
    number_part,
)
from gpu_etl.encoding import day_shifts, pieces
from gpu_etl.errors import BadRowError, DataError
from gpu_etl.extract import Source
from gpu_etl.parts import Part
from gpu_etl.prefetch import OneBehind
from gpu_etl.settings import Settings
from gpu_etl.tally import Tally

TASK_ROWS = 1 << 17
START_SECONDS = "60s"
Call = tuple[Callable, tuple]


class Cluster:
    """Runs the tasks; for use in `with`. buckets: of the shuffle. Raises DataError where no scheduler answers."""

    def __init__(self, sources: list[Source], settings: Settings, work: Path, buckets: int):
        self._sources = [_resolved(source) for source in sources]
        if settings.workers and not settings.threads:
            settings = replace(settings, threads=max(1, (os.cpu_count() or 1) // settings.workers))
        self._settings, self._work, self._buckets = settings, work.resolve(), buckets
        self._local = None if settings.scheduler else _local_cluster(settings)
        try:
            self._client = Client(settings.scheduler or self._local, timeout=START_SECONDS)
        except OSError as error:
            raise DataError(f"--scheduler {settings.scheduler}: no Dask scheduler answers there ({error})") from error
        print(f"Dask dashboard: {self._client.dashboard_link}", file=sys.stderr)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        for ending in filter(None, (self._client, self._local)):
            try:
                ending.close()
            except (OSError, RuntimeError) as error:  # a TimeoutError is an OSError; what was asked for is done
                print(f"Dask did not end in order ({type(error).__name__}: {error})", file=sys.stderr)

    def _run(self, name: str, calls: list[Call], done: Callable[[int], None] = lambda place: None) -> list:
        """Results of calls of tasks, in order; done(place) is told of each. The first error ends it all."""
        futures = [self._client.submit(task, *arguments, pure=False) for task, arguments in calls]
        places = {future.key: place for place, future in enumerate(futures)}
        with tqdm(total=len(futures), desc=name, unit="task", file=sys.stderr) as bar:
            for future in as_completed(futures):
                if future.status == "error":
                    error = future.exception()
                    self._client.cancel(futures)
                    raise error
                done(places[future.key])
                bar.update()
        return self._client.gather(futures)

    def _cut(self) -> list[Part]:
        """The parts, with the numbers of their first rows, which take a look at all bytes before a part's."""
        workers = self._settings.workers or len(self._client.scheduler_info(n_workers=-1)["workers"])
        ranges = parts.cut(self._sources, self._settings, max(1, workers))
        ahead = [
            i for i, this in enumerate(ranges[:-1]) if ranges[i + 1].day == this.day
        ]  # the last part of a day is ahead of none
        paths = {i: self._sources[ranges[i].day].files[ranges[i].file].path for i in ahead}
        calls = [(parts.count_rows, (paths[i], ranges[i].begin, ranges[i].end)) for i in ahead]
        rows = dict(zip(ahead, self._run("find rows", calls), strict=True)) if calls else {}
        found: list[Part] = []
        for number, this in enumerate(ranges):
            first = found[-1].first_row + rows[number - 1] if number - 1 in rows else 0
            found.append(Part(number, *this, first, found[-1].file_row if this.begin else first))
        parts.save(found, self._work)
        return found

    def count(self) -> list[Tally]:
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
            with OneBehind() as summing:
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


def _local_cluster(settings: Settings) -> LocalCluster:
    """Processes of this machine; with --device cuda one a GPU."""
    if settings.device == "cuda":
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise DataError(f"--workers with --device cuda: {error}; pip install dask-cuda") from error
        from numba import cuda

        if settings.workers > len(cuda.gpus):
            raise DataError(
                f"--workers {settings.workers} with --device cuda: each takes a GPU, and {len(cuda.gpus)} are visible "
                "(nvidia-smi, CUDA_VISIBLE_DEVICES); ask for fewer"
            )
        return LocalCUDACluster(n_workers=settings.workers, silence_logs=50)
    return LocalCluster(n_workers=settings.workers, threads_per_worker=1, silence_logs=50)
