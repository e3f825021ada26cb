"""What the workers of a cluster do: count a part, merge counts, give ids, and write ranges of the final files."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np

from gpu_etl.backend import select as backend
from gpu_etl.cluster import shared_files
from gpu_etl.cluster.byte_ranges import CountTask
from gpu_etl.cluster.probe import code_digest, code_root
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError, KeepWorkError, WorkDamagedError
from gpu_etl.dataset.manifest import describe_file
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.coded_rows import Spill
from gpu_etl.passes.count import CountPass
from gpu_etl.passes.integrity import add, check_file, identity, numbered_sum, rows_sum
from gpu_etl.passes.journal import Journal
from gpu_etl.passes.settings import Settings, without_bad_rows
from gpu_etl.passes.work_dir import JOB, JOURNAL, clear
from gpu_etl.raw.source import Source
from gpu_etl.raw.stamps import located
from gpu_etl.rows import vocabulary
from gpu_etl.rows.numbered import first_number, words_of
from gpu_etl.rows.random_keys import keys_of
from gpu_etl.rows.statistics import DayStatistics
from gpu_etl.rows.vocabulary import ColumnCounts, Counts
from gpu_etl.schema import COLUMNS, RECORD_DTYPE, SPARSE, Preset

COUNTS, IDS = "counts.npz", "ids.npz"
LOCK_SECONDS = 0.2
CODE_DIGEST = code_digest(code_root())  # as it is imported: a worker may live longer than the files
Counted = tuple[DayStatistics, list[int], int]
"""Of a part: its tally, how many rows each bucket got, the sum of its coded rows' digests."""


def checked(digest: str, work: Path, task: Callable, arguments: tuple):
    """A task, after a look at what may be another than when the cluster was checked: workers come later, too. digest:
    of the code of whoever gives the work; work: the folder that all work in."""
    where = f"worker {socket.gethostname()}, process {os.getpid()}"
    if digest != CODE_DIGEST:
        raise KeepWorkError(
            f"{where}: another state of this project's code ({CODE_DIGEST[:12]}) than that of the command "
            f"({digest[:12]}); it came later: end it, or bring it up to date, and give the same command again"
        )
    if not (work / JOB).is_file():
        raise KeepWorkError(
            f"{where}: does not see {work}; it came later, and all workers must see the same folders: end it, and give "
            "the same command again"
        )
    return task(*arguments)


def _journal(path: Path, seconds: float) -> Journal:
    """The journal of a part. A task of an earlier run may still be at work there, which nobody can stop: it is waited
    for. Raises KeepWorkError where it does not end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return Journal(path)
        except DataError as error:
            if time.monotonic() > deadline:
                raise KeepWorkError(
                    f"{path}: still held by a task of an earlier run after {seconds:g} s; it may hang on a stopped "
                    "worker: end that one, and give the same command again"
                ) from error
        time.sleep(LOCK_SECONDS)


def save_counts(path: Path, counts: Counts) -> None:
    """Write counts, whole or not at all."""
    arrays = {}
    for c, column in enumerate(counts.columns):
        arrays |= {f"keys_{c}": column.keys, f"counts_{c}": column.counts, f"first_{c}": column.first_rows}
    _save(path, arrays)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part.npz")
    np.savez(temporary, **arrays)
    temporary.rename(path)


def load_counts(path: Path) -> Counts:
    """What save_counts() wrote."""
    with np.load(path) as arrays:
        return Counts(tuple(
            ColumnCounts(arrays[f"keys_{c}"], arrays[f"counts_{c}"], arrays[f"first_{c}"]) for c in range(SPARSE)
        ))  # fmt: skip


def _kernels(device: str):
    """The slab functions, ready for this thread: a worker runs each task in any of its threads."""
    kernels = backend.device(device)
    kernels.enter_thread()
    return kernels


def _one_at_a_time(task: Callable) -> Callable:
    """Tasks of a worker's threads share what the functions of a GPU work in: the next one begins when one has ended."""

    @wraps(task)
    def run(*arguments):
        settings = next(argument for argument in arguments if isinstance(argument, Settings))
        with _device_lock if settings.device == "cuda" else nullcontext():
            return task(*arguments)

    return run


_device_lock = threading.Lock()


def check_device(name: str) -> None:
    """Raise DataError where this worker does not have the device."""
    with _device_lock:
        backend.device(name)


@_one_at_a_time
def count_part(days: list[Source], part: CountTask, settings: Settings, work: Path, buckets: int) -> Counted:
    """Task: the count pass over one part, in its folder; anew, which is said, where an earlier run of it left damaged
    work there."""
    folder = part.folder(work)
    folder.mkdir(exist_ok=True)
    sources = [*days[: part.day], part.range.source(days), *days[part.day + 1 :]]
    this = identity([asdict(part), buckets, without_bad_rows(settings.shaping()), located(sources[part.day])])
    journal = _journal(folder / JOURNAL, settings.worker_timeout)
    try:
        if journal.events and journal.events[0].get("part") != this:
            print(f"{folder}: the work of another run; this part begins anew", file=sys.stderr)
            clear(folder, journal)
        if not journal.events:
            clear(folder, journal)
            journal.record(part=this)
        try:
            return _count(sources, part, settings, journal, folder, buckets)
        except WorkDamagedError as error:
            print(f"{error}; this part begins anew", file=sys.stderr)
        clear(folder, journal)
        journal.record(part=this)
        return _count(sources, part, settings, journal, folder, buckets)
    finally:
        journal.close()


def _count(
    sources: list[Source], part: CountTask, settings: Settings, journal: Journal, folder: Path, buckets: int
) -> Counted:
    kernels = _kernels(settings.device)
    threads = kernels.set_threads(settings.threads)
    kernels.set_memory_limit(settings.memory_limit)
    counting = CountPass(
        kernels, sources, settings.preset, settings.seed, journal, folder, threads, settings.bad_rows,
        settings.max_bad_rows, settings.to_buckets(len(sources)), part.day, part.first_row,
    )  # fmt: skip
    counting.tallies[part.day].before_part = part.file_row  # so that errors tell the row's number in its file
    store = Buckets(folder, buckets, settings.seed, counting.kept_in_buckets, part.first_row)
    if not journal.all("counted"):
        save_counts(folder / COUNTS, counting.run(settings.slab_bytes or kernels.SLAB_BYTES, store))
        journal.record(counted=describe_file(folder / COUNTS))
    else:
        check_file(folder / COUNTS, journal.all("counted")[0])
        for _ in counting.stored(store):  # it raises where they are others than were counted
            pass
    store.close()
    return counting.tallies[part.day], store.rows(), add(*counting.sums)


def merge_counts(a: Path, b: Path, out: Path) -> Path:
    """Task: the counts of two files, merged into a third."""
    save_counts(out, load_counts(a).merge(load_counts(b)))
    return out


def number_part(folder: Path, preset: Preset, work: Path) -> None:
    """Task: the ids of one part's dictionary codes, by the vocabulary of all days."""
    ids = vocabulary.Vocabulary.load(work).ids(Spill.keys_in(folder), preset)
    _save(folder / IDS, {f"arr_{column}": column_ids for column, column_ids in enumerate(ids)})


@lru_cache(maxsize=64)
def _finisher(folder: Path, device: str, shift: int, _stamp: int):
    with np.load(folder / IDS) as arrays:
        return _kernels(device).Finisher(tuple(arrays.values()), np.array([shift]))


def _finish(folder: Path, coded: np.ndarray, shift: int, device: str, records: np.ndarray) -> None:
    """Write the records of coded rows of one part, in their order."""
    _kernels(device)
    finisher = _finisher(folder, device, shift, (folder / IDS).stat().st_mtime_ns)
    finisher.take(coded, 0)
    finisher.finish(0, len(coded), records)()


class _Memory(threading.local):
    """Memory of this thread's tasks: Dask's workers give freed memory back at once, and fresh pages cost more than the
    work on them."""

    def __init__(self):
        self.read, self.finished, self.sorted = ScratchBuffer(), ScratchBuffer(), ScratchBuffer()


_memory = _Memory()


@_one_at_a_time
def encode_bucket(
    split: str, row: int, rows: int, bucket: int, buckets: int, parts: list[tuple[Path, int]], table_sizes: list[int],
    settings: Settings, work: Path,
) -> int:  # fmt: skip
    """Task: shuffle one bucket, of so many rows of all training days, and write it into the split from row `row` on.
    Returns the sum of the coded rows' digests.

    parts: folder of every part that trains, and what is added to its integers.
    """
    numbers, records = np.empty(rows, np.int64), _memory.finished.empty((rows, COLUMNS), RECORD_DTYPE)
    begin = found = 0
    for folder, shift in parts:
        numbered = Buckets(folder, buckets, settings.seed, None).read(bucket, _memory.read)
        end, found = begin + len(numbered), add(found, numbered_sum(numbered))
        numbers[begin:end] = numbered["row"]
        _finish(folder, words_of(numbered), shift, settings.device, records[begin:end])
        begin = end
    in_order = _memory.sorted.empty(records.shape, RECORD_DTYPE)
    np.take(records, np.argsort(keys_of(settings.seed, numbers)), 0, in_order, "clip")  # "raise" would buffer
    shared_files.write_at(settings.form, work, split, table_sizes, row, in_order)
    return found


@_one_at_a_time
def encode_rows(
    split: str, row: int, begin: int, end: int, part: CountTask, shift: int, table_sizes: list[int], settings: Settings,
    work: Path,
) -> int:  # fmt: skip
    """Task: write rows begin to end of a part into a split from row `row` on, in their order. Returns the sum of the
    coded rows' digests."""
    folder, found = part.folder(work), 0
    step = backend.device(settings.device).ENCODE_ROWS
    for start in range(begin, end, step):
        coded = Spill.rows_in(folder, part.day, start, min(start + step, end))
        found = add(found, rows_sum(coded, first_number(part.day) + part.first_row + start))
        records = _memory.finished.empty(coded.shape, RECORD_DTYPE)
        _finish(folder, coded, shift, settings.device, records)
        shared_files.write_at(settings.form, work, split, table_sizes, row + start - begin, records)
    return found
