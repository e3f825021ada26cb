"""Both passes over several processes, as Dask tasks: a day is counted by one, a bucket or a run of rows encoded by one.

All workers see the same folders. A day's part of the work lies in a folder of its own, with a journal, so the task of
a worker that died goes on elsewhere where it was. Counts are merged as a tree; each task of the encode pass writes its
own range of the final files. The bytes are those of one process.
"""

import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from dask.distributed import Client, LocalCluster, as_completed
from tqdm import tqdm

from gpu_etl import backend, formats, manifest, vocabulary
from gpu_etl.counting import CountPass, Tally
from gpu_etl.encoding import day_shifts
from gpu_etl.errors import BadRowError, DataError
from gpu_etl.extract import Source
from gpu_etl.journal import Journal
from gpu_etl.schema import COLUMNS, RECORD_DTYPE, SPARSE, Preset
from gpu_etl.settings import Settings
from gpu_etl.shuffle import Buckets, keys_of
from gpu_etl.spill import Spill
from gpu_etl.vocabulary import ColumnCounts, Counts

COUNTS, IDS = "counts.npz", "ids.npz"
TASK_ROWS = 1 << 18
START_SECONDS = "60s"


def _part(work: Path, day: int) -> Path:
    return work / f"part_{day}"


def _save_counts(path: Path, counts: Counts) -> None:
    arrays = {}
    for c, column in enumerate(counts.columns):
        arrays |= {f"keys_{c}": column.keys, f"counts_{c}": column.counts, f"first_{c}": column.first_rows}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part.npz")
    np.savez(temporary, **arrays)
    temporary.rename(path)


def _load_counts(path: Path) -> Counts:
    with np.load(path) as arrays:
        return Counts(tuple(
            ColumnCounts(arrays[f"keys_{c}"], arrays[f"counts_{c}"], arrays[f"first_{c}"]) for c in range(SPARSE)
        ))  # fmt: skip


def count_day(paths: list[Path], day: int, settings: Settings, work: Path, buckets: int) -> tuple[Tally, list[int]]:
    """Task: the count pass over one day, in its folder. Returns its tally, and how many rows each bucket got."""
    part = _part(work, day)
    part.mkdir(exist_ok=True)
    kernels = backend.device(settings.device)
    threads = kernels.set_threads(settings.threads)
    kernels.set_memory_limit(settings.memory_limit)
    sources = [Source(path, path.stat().st_size) for path in paths]
    journal = Journal(part / "journal.jsonl")
    try:
        counting = CountPass(
            kernels, sources, settings.preset, settings.seed, journal, part, threads, settings.bad_rows,
            settings.max_bad_rows, settings.to_buckets(len(paths)), only=day,
        )  # fmt: skip
        store = Buckets(part, buckets, settings.seed, counting.kept_in_buckets)
        if not journal.all("counted"):
            _save_counts(part / COUNTS, counting.run(settings.slab_bytes, store))
            journal.record(counted=True)
        store.close()
        return counting.tallies[day], store.rows()
    finally:
        journal.close()


def merge_counts(a: Path, b: Path, out: Path) -> Path:
    """Task: the counts of two files, merged into a third."""
    _save_counts(out, _load_counts(a).merge(_load_counts(b)))
    return out


def number_day(day: int, preset: Preset, work: Path) -> int:
    """Task: the ids of one day's dictionary codes, by the vocabulary of all days."""
    part = _part(work, day)
    keys = Spill.keys_in(part)
    np.savez(part / IDS, *vocabulary.Vocabulary.load(work).ids(keys, preset))
    return day


@lru_cache(maxsize=64)
def _finisher(part: Path, device: str, _stamp: int):
    with np.load(part / IDS) as arrays:
        return backend.device(device).Finisher(tuple(arrays.values()))


def _finish(day: int, coded: np.ndarray, shift: int, settings: Settings, work: Path) -> np.ndarray:
    """Records of coded rows of one day, in their order."""
    part = _part(work, day)
    records = np.empty((len(coded), COLUMNS), RECORD_DTYPE)
    finisher = _finisher(part, settings.device, (part / IDS).stat().st_mtime_ns)
    finisher.finish(coded, np.arange(len(coded)), np.full(len(coded), shift), records)
    return records


def encode_bucket(
    bucket: int, row: int, days: list[int], buckets: int, shifts: np.ndarray, table_sizes: list[int],
    settings: Settings, work: Path,
) -> int:  # fmt: skip
    """Task: shuffle one bucket of all training days and write it from row `row` on. Returns its rows."""
    numbers, records = [np.empty(0, np.int64)], [np.empty((0, COLUMNS), RECORD_DTYPE)]
    for day in days:
        numbered = Buckets(_part(work, day), buckets, settings.seed, None).read(bucket)
        numbers.append(numbered["row"])
        records.append(_finish(day, numbered["coded"], int(shifts[day]), settings, work))
    numbers, records = np.concatenate(numbers), np.concatenate(records)
    order = np.argsort(keys_of(settings.seed, numbers))
    formats.write_at(settings.form, work, "train", table_sizes, row, records[order])
    return len(records)


def encode_rows(
    split: str, day: int, begin: int, end: int, row: int, shifts: np.ndarray, table_sizes: list[int],
    settings: Settings, work: Path,
) -> int:  # fmt: skip
    """Task: write rows begin to end of a day into a split from row `row` on, in their order. Returns how many."""
    coded = Spill.rows_in(_part(work, day), day, begin, end)
    records = _finish(day, coded, int(shifts[day]), settings, work)
    formats.write_at(settings.form, work, split, table_sizes, row, records)
    return len(records)


def describe(name: str, work: Path) -> tuple[str, dict]:
    """Task: an output file's entry in the manifest; it is on the disk then."""
    with open(work / name, "rb") as file:
        os.fsync(file.fileno())
    return name, manifest.describe_file(work / name)


class Cluster:
    """Runs the tasks; for use in `with`. buckets: of the shuffle. Raises DataError where no scheduler answers."""

    def __init__(self, sources: list[Source], settings: Settings, work: Path, buckets: int):
        self._paths = [source.path.resolve() for source in sources]
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
        self._client.close()
        if self._local is not None:
            self._local.close()

    def _run(self, name: str, task, arguments: list[tuple]) -> list:
        """Results of a task over lists of arguments, in order. The first error ends it all."""
        futures = [self._client.submit(task, *some, pure=False) for some in arguments]
        with tqdm(total=len(futures), desc=name, unit="task", file=sys.stderr) as bar:
            for done in as_completed(futures):
                if done.status == "error":
                    error = done.exception()
                    self._client.cancel(futures)
                    raise error
                bar.update()
        return self._client.gather(futures)

    def count(self) -> list[Tally]:
        """The count pass; returns a tally a day."""
        common = self._settings, self._work, self._buckets
        found = self._run("count", count_day, [(self._paths, day, *common) for day in range(len(self._paths))])
        self._tallies, self._bucket_rows = [tally for tally, _ in found], [rows for _, rows in found]
        limit = self._settings.max_bad_rows
        bad = sum(tally.bad_rows() for tally in self._tallies)
        if bad > limit:
            raise BadRowError(f"{bad} bad rows in all days, more than --max-bad-rows {limit}")
        return self._tallies

    def number(self) -> tuple[list[int], list[int]]:
        """Merge the counts and give ids; returns the table sizes, and the distinct values a column."""
        level = [_part(self._work, day) / COUNTS for day in range(len(self._paths))]
        while len(level) > 1:
            pairs = list(zip(level[::2], level[1::2], strict=False))
            outs = [self._work / f"merged_{len(level)}_{i}.npz" for i in range(len(pairs))]
            merged = self._run("merge", merge_counts, [(*pair, out) for pair, out in zip(pairs, outs, strict=True)])
            level = merged + level[2 * len(pairs) :]
        counts = _load_counts(level[0])
        words, _ = vocabulary.build(counts, self._settings.preset)
        words.save(self._work)
        self._table_sizes = words.table_sizes
        days = [(day, self._settings.preset, self._work) for day in range(len(self._paths))]
        self._run("number", number_day, days)
        return words.table_sizes, [len(column.keys) for column in counts.columns]

    def encode(self, ranges: dict[str, tuple[int, int]]) -> dict[str, dict]:
        """The encode pass; returns the manifest's entries of the files."""
        form, work = self._settings.form, self._work
        for split, (begin, end) in ranges.items():
            formats.allocate(form, work, split, self._table_sizes, end - begin)
        shifts = day_shifts([tally.smallest for tally in self._tallies], self._settings.preset)
        common = shifts, self._table_sizes, self._settings, work
        inside = self._settings.to_buckets(len(self._paths))
        training = [day for day, in_buckets in enumerate(inside) if in_buckets]
        rows = np.sum([self._bucket_rows[day] for day in training], axis=0, dtype=np.int64) if training else []
        begins = np.cumsum(rows) - rows if training else []
        self._run("encode buckets", encode_bucket, [
            (bucket, int(begin), training, self._buckets, *common) for bucket, begin in enumerate(begins)
        ])  # fmt: skip
        in_order = [split for split in ranges if split != "train" or not training]
        pieces = [piece for split in in_order for piece in self._pieces(split, *ranges[split])]
        self._run("encode rows", encode_rows, [(*piece, *common) for piece in pieces])
        for name, text in formats.extra_files(form, self._table_sizes).items():
            (work / name).write_text(text)
        names = [name for split in ranges for name in formats.files(form, split)]
        names += [vocabulary.FILE_NAME, *formats.extra_files(form, self._table_sizes)]
        return dict(self._run("checksums", describe, [(name, work) for name in names]))

    def _pieces(self, split: str, begin: int, end: int) -> list[tuple[str, int, int, int, int]]:
        """(split, day, begin, end, row in the split) of the rows begin to end of all days, TASK_ROWS at a time."""
        found, first = [], 0
        for day, tally in enumerate(self._tallies):
            for start in range(max(begin - first, 0), min(end - first, tally.kept), TASK_ROWS):
                stop = min(start + TASK_ROWS, end - first, tally.kept)
                found.append((split, day, start, stop, first + start - begin))
            first += tally.kept
        return found


def _local_cluster(settings: Settings) -> LocalCluster:
    """Processes of this machine; with --device cuda one a GPU."""
    if settings.device == "cuda":
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise DataError(f"--workers with --device cuda: {error}; pip install dask-cuda") from error
        return LocalCUDACluster(n_workers=settings.workers, silence_logs=50)
    return LocalCluster(n_workers=settings.workers, threads_per_worker=1, silence_logs=50)

