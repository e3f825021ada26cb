"""Raw days -> data set: checks, the count pass, the encode pass, and the final names, each resumable."""

import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from gpu_etl.backend import select as backend
from gpu_etl.common.errors import BadRowError, DataError, DeviceMemoryError, KeepWorkError
from gpu_etl.common.threads import Crew
from gpu_etl.dataset import formats, manifest
from gpu_etl.passes import integrity, kept
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.count import CountPass
from gpu_etl.passes.encode import EncodePass, day_shifts, scatter
from gpu_etl.passes.journal import Journal
from gpu_etl.passes.publish import publish, stamps
from gpu_etl.passes.settings import Settings
from gpu_etl.passes.work_dir import JOB, JOURNAL, WORK, describe_job, finished, guess_rows, prepare, remove, until_sound
from gpu_etl.raw.reader import open_sources
from gpu_etl.raw.source import Source
from gpu_etl.raw.stamps import Stamp, check_unchanged
from gpu_etl.rows import splits, vocabulary
from gpu_etl.rows.statistics import DayStatistics
from gpu_etl.schema import FIRST_DENSE

IDS = "ids.npz"


@dataclass
class Report:
    """What a run cost: seconds by stage (of this process only), peak memory in bytes, of the host and of the device,
    and the dictionaries' part of it; distinct values per column."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    device_bytes: int = 0
    dictionary_bytes: int = 0
    distinct: list[int] = field(default_factory=list)
    resumed: bool = False

    @contextmanager
    def stage(self, name: str):
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(
    kernels: ModuleType, counting: CountPass, buckets: Buckets, settings: Settings, journal: Journal, work: Path,
    report: Report,
) -> list[int]:  # fmt: skip
    """The count pass and the vocabulary, unless an earlier run made them; returns the table sizes."""
    if not journal.all("counted"):
        with report.stage("count"):
            counts = counting.run(settings.slab_bytes or kernels.SLAB_BYTES, buckets)
        report.dictionary_bytes = counting.dictionary_bytes
        with report.stage("vocabulary"):
            words, ids = vocabulary.build(counts, settings.preset)
            words.save(work)
            np.savez(work / IDS, *ids)
        distinct = [len(column.keys) for column in counts.columns]
        files = {name: manifest.describe_file(work / name) for name in (vocabulary.FILE_NAME, IDS)}
        if any(counting.to_buckets):
            journal.record(bucket_sums=buckets.sums.tolist())
        journal.record(counted={"distinct": distinct, "table_sizes": words.table_sizes, "files": files})
    elif not journal.all("files"):
        integrity.check_file(work / IDS, journal.all("counted")[0]["files"][IDS])
        for _ in counting.spilled():  # the compiled loops that encode rows look at no bound of their codes
            pass
    (counted,) = journal.all("counted")
    report.distinct = counted["distinct"]
    return counted["table_sizes"]


def _ranges(tallies: list[DayStatistics], settings: Settings) -> dict[str, tuple[int, int]]:
    """Rows of each split."""
    day_rows = [tally.kept for tally in tallies]
    if settings.fractions:
        return splits.by_fractions(sum(day_rows), settings.fractions)
    if settings.days:
        day_rows = splits.equal_days(sum(day_rows), settings.days)
    return splits.by_last_day(day_rows, settings.preset.last_day)


def _buckets(settings: Settings, job: dict, counting: CountPass, journal: Journal, work: Path) -> Buckets:
    """The shuffle's buckets with what an earlier run has surely put there; none where rows stay in order."""
    kept = counting.kept_in_buckets
    for event in journal.all("scattered"):
        kept[event["day"]] += event["rows"]
    gathering = bool(journal.all("gathered"))
    buckets = Buckets(work, job["buckets"], settings.seed, None if gathering else kept)
    for sums in journal.all("bucket_sums"):
        buckets.sums[:] = sums
    return buckets


def _encode(
    kernels: ModuleType, counting: CountPass, buckets: Buckets, ranges: dict[str, tuple[int, int]],
    table_sizes: list[int], settings: Settings, journal: Journal, work: Path,
) -> dict[str, Stamp]:  # fmt: skip
    """The encode pass, split by split; training rows come from the buckets, if rows are shuffled. Returns the stamps of
    the files that it wrote.

    Raises WorkDamagedError where the rows that went into the splits are not those that were counted.
    """
    day_rows = [tally.kept for tally in counting.tallies]
    spilled = counting.store is None and settings.shuffle and not any(counting.to_buckets)
    if spilled and not journal.all("bucket_sums"):
        scatter(counting.spill, buckets, day_rows, *ranges["train"], journal)
    shifts = day_shifts([tally.smallest for tally in counting.tallies], settings.preset)
    with np.load(work / IDS) as arrays:
        ids = tuple(arrays.values())
    passed = kernels, counting.spill, buckets, day_rows, shifts, ids, table_sizes, settings.form, journal, work
    store = counting.store
    encoding = EncodePass(*passed) if store is None else kept.KeptEncodePass(store.kept, settings.seed, *passed)
    finished, written = {event["name"] for event in journal.all("split")}, {}
    for split, (begin, end) in ranges.items():
        if split not in finished:
            encoding.run(split, begin, end, settings.shuffle and split == "train")
            written |= stamps(work, journal.all("split")[-1]["files"])
    encoded = integrity.add(*({event["name"]: event["sum"] for event in journal.all("split")}.values()))
    integrity.expect(encoded, integrity.add(*counting.sums), work, "the coded rows of all splits")
    return written


def _run_on_cluster(
    work: Path, out: Path, sources: list[Source], settings: Settings, job: dict, report: Report
) -> manifest.Manifest:
    """Both passes as tasks of several processes, and the final names."""
    from gpu_etl.cluster.driver import Cluster  # Dask: a second that other runs need not wait for

    with Cluster(sources, settings, work, job["buckets"]) as cluster:
        with report.stage("count"):
            tallies = cluster.count()
        with report.stage("vocabulary"):
            table_sizes, report.distinct = cluster.number()
        ranges = _ranges(tallies, settings)
        with report.stage("encode"):
            files = cluster.encode(ranges)
        result = _describe(sources, tallies, ranges, table_sizes, files, settings)
        _publish(work, out, sources, result, stamps(work, files))  # before the cluster's end, which may fail
    return result


def _run(
    journal: Journal, work: Path, out: Path, sources: list[Source], settings: Settings, job: dict, report: Report
) -> manifest.Manifest:
    """Both passes, or what is left of them, and the final names."""
    kernels = backend.device(settings.device)
    try:
        return _run_on(kernels, journal, work, out, sources, settings, job, report)
    finally:  # before what it uses is dropped
        kernels.synchronize()


def _run_on(
    kernels: ModuleType, journal: Journal, work: Path, out: Path, sources: list[Source], settings: Settings, job: dict,
    report: Report,
) -> manifest.Manifest:  # fmt: skip
    threads = kernels.set_threads(settings.threads)
    kernels.set_memory_limit(settings.memory_limit)
    counting = CountPass(
        kernels, sources, settings.preset, settings.seed, journal, work, threads, settings.bad_rows,
        settings.max_bad_rows, settings.to_buckets(len(sources)),
    )  # fmt: skip
    buckets = _buckets(settings, job, counting, journal, work)
    buckets.crew = Crew(max(1, int(threads / kernels.CORES_PER_WRITER)))
    on_device = kept.begin(kernels, journal, guess_rows(sources, settings.preset)) if settings.keep_on_device else None
    if on_device is not None:
        counting.store = kept.Store(on_device, journal, counting.spill, buckets, counting.to_buckets)
    table_sizes = _count(kernels, counting, buckets, settings, journal, work, report)
    ranges = _ranges(counting.tallies, settings)
    written = {}
    if not journal.all("files"):
        with report.stage("encode"):
            written = _encode(kernels, counting, buckets, ranges, table_sizes, settings, journal, work)
        names = vocabulary.FILE_NAME, *formats.write_extra_files(settings.form, work, table_sizes)
        files = {name: entry for event in journal.all("split") for name, entry in event["files"].items()}
        (counted,) = journal.all("counted")
        integrity.check_file(work / vocabulary.FILE_NAME, counted["files"][vocabulary.FILE_NAME])
        files |= {name: manifest.describe_file(work / name) for name in names}
        written |= stamps(work, names)
        journal.record(files=files)
    report.device_bytes = kernels.peak_device_bytes()
    (files,) = journal.all("files")
    result = _describe(sources, counting.tallies, ranges, table_sizes, files, settings)
    _publish(work, out, sources, result, written)
    return result


def _publish(
    work: Path, out: Path, sources: list[Source], result: manifest.Manifest, written: dict[str, Stamp]
) -> None:
    """The final names, if the day files are still what they were. written: see publish()."""
    for source in sources:
        check_unchanged(source, KeepWorkError)
    publish(work, out, result, written)


def _describe(
    sources, tallies: list[DayStatistics], ranges, table_sizes, files, settings: Settings
) -> manifest.Manifest:
    return manifest.Manifest(
        rows={split: end - begin for split, (begin, end) in ranges.items()},
        table_sizes=table_sizes,
        settings=settings.shaping(),
        sources=[
            {
                "file": s.path.name,
                "bytes": s.size,
                "crc32": t.crc32,
                "rows": t.read,
                "dropped": t.reasons(),
                "kept": t.kept,
                "clicks": t.clicks,
                "missing": t.missing[FIRST_DENSE:].tolist(),
            }
            for s, t in zip(sources, tallies, strict=True)
        ],
        files=files,
    )


def _explain(error: OSError, out: Path) -> Exception:
    """The error with what to do about it. A TimeoutError and errors of the network are OSErrors too."""
    again = "give the same command again: it goes on where it was"
    if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return KeepWorkError(f"{words} (not a fault of the disk); the work in {out} is kept: {again}")
    return OSError(error.errno, f"{error.strerror or error}; mend that, then {again}", error.filename or str(out))


def encode_days(inputs: list[Path], out: Path, settings: Settings) -> tuple[manifest.Manifest, Report]:
    """Encode raw day files into a data set in folder `out`. Returns its manifest and what it cost.

    Memory: a few slabs, the dictionaries, a few shuffle buckets. Disk, beside the result: 168 B a row while it runs.
    A run that was killed, or whose disk was full, goes on where it was when it is started again, and ends with the same
    bytes. Raises DataError on bad input or settings; nothing stays in `out` then, except the work done before a bad
    row, from where a run that leaves it out can go on, or where a file of somebody else has the name of one of the data
    set. Raises OSError where the disk fails or is full. Nothing is replaced or removed that an encode has not written.
    """
    settings.check(len(inputs))
    sources = open_sources(inputs)
    out, report = Path(out), Report()
    existed = out.exists()
    job = describe_job(sources, settings)
    result = finished(out, job, sources)
    if result is None:
        work = prepare(out, job, sources, settings)
        journal = Journal(work / JOURNAL)

        def run() -> manifest.Manifest:
            report.resumed = len(journal.events) > 1 or any(work.glob("part_*"))
            if settings.on_cluster:
                return _run_on_cluster(work, out, sources, settings, job, report)
            return _run(journal, work, out, sources, settings, job, report)

        try:
            result = until_sound(work, journal, job, sources, run)
        except DataError as error:
            if settings.on_cluster and any(work.glob("part_*")):
                raise  # tasks of other workers may still run; what they do is good for the next try
            if isinstance(error, (DeviceMemoryError, KeepWorkError)):
                raise
            if isinstance(error, BadRowError) and journal.all("slab"):
                raise BadRowError(
                    f"{error}. The work done before that row is kept in {work}: the same command goes on from there "
                    "with --bad-rows skip (or a higher --max-bad-rows); delete that folder to start anew"
                ) from error
            remove(work)
            if not existed and not any(out.iterdir()):
                out.rmdir()
            raise
        except OSError as error:
            raise _explain(error, out) from error
        except Exception as error:
            raise backend.explain(error) from error
        finally:
            journal.close()
    else:
        print(f"{out}: finished already, by the same command", file=sys.stderr)
    if (out / WORK / JOB).exists():
        remove(out / WORK)
    return result, report
