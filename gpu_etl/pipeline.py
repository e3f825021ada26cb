"""Raw days -> data set: checks, the count pass, the encode pass, and the final names, each resumable."""

import json
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from gpu_etl import backend, formats, manifest, splits, vocabulary
from gpu_etl.counting import CountPass, Tally
from gpu_etl.encoding import EncodePass, day_shifts, scatter
from gpu_etl.errors import BadRowError, DataError
from gpu_etl.extract import Source, open_sources
from gpu_etl.journal import Journal
from gpu_etl.schema import FIRST_DENSE, PRESETS, RECORD_BYTES, Preset
from gpu_etl.shuffle import Buckets, bucket_count
from gpu_etl.spill import NUMBERED

WORK = ".work"
JOB, JOURNAL, IDS = "job.json", "journal.jsonl", "ids.npz"
MIN_SLAB_BYTES = 1 << 10
BAD_ROWS = ("error", "skip")
ASSUMED_ROW_BYTES = {".gz": 80, ".zst": 70, ".parquet": 60}  # of such a file, to guess at its rows; text: below
ASSUMED_TEXT_ROW_BYTES = 220


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the encoded bytes, and what does not: device, threads, workers, scheduler, slab_bytes,
    max_bad_rows.

    days: cut the one input file into so many days; 0: every file is a day. fractions: shares of all rows that train,
    test and validate, in file order, instead of halving the last day. form: one of formats.FORMS. bad_rows: "error" or
    "skip", up to max_bad_rows. threads: of the CPU, 0 for all cores. workers, scheduler: spread the days over so many
    processes of this machine, or over those of a Dask scheduler (see cluster.py).
    """

    preset: Preset = PRESETS["count"]
    days: int = 0
    fractions: tuple[float, ...] = ()
    shuffle: bool = True
    seed: int = 0
    form: str = "records"
    bad_rows: str = "error"
    max_bad_rows: int = 1000
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    scheduler: str = ""
    slab_bytes: int = 8 << 20

    def check(self, inputs: int) -> None:
        """Raise DataError where a setting is out of range or does not fit the number of input files."""
        self.preset.check()
        if self.slab_bytes < MIN_SLAB_BYTES:
            raise DataError(f"--slab-bytes: expected {MIN_SLAB_BYTES} or more, got {self.slab_bytes}")
        if self.threads < 0 or self.workers < 0:
            raise DataError(f"--threads, --workers: expected 0 or more, got {self.threads} and {self.workers}")
        if self.on_cluster and (self.days or self.fractions):
            raise DataError(
                "--workers and --scheduler give each day file to one worker: not with --days or --fractions, where all "
                "rows must be counted before it is known which of them train"
            )
        if self.form not in formats.FORMS:
            raise DataError(f"--format: expected one of {', '.join(formats.FORMS)}, got {self.form!r}")
        if self.bad_rows not in BAD_ROWS or self.max_bad_rows < 0:
            raise DataError(f"--bad-rows: expected {' or '.join(BAD_ROWS)}, with --max-bad-rows 0 or more")
        if self.days and (self.days < 2 or inputs != 1):
            raise DataError(
                f"--days {self.days} with {inputs} input files: expected one file to cut into 2 or more days"
            )
        shares = self.fractions
        if shares and (len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9):
            raise DataError(f"--fractions {shares}: expected three shares (train, test, val) that add up to 1")
        if self.fractions and self.days:
            raise DataError("--fractions and --days: choose one")
        if self.days and self.preset.sample != self.preset.sample_last:
            raise DataError(
                f"--days with --sample {self.preset.sample} --sample-last {self.preset.sample_last}: where the last "
                "day of one file begins is not known before it was read; give both the same value"
            )

    @property
    def on_cluster(self) -> bool:
        """Whether several processes share the work."""
        return bool(self.workers or self.scheduler)

    def to_buckets(self, days: int) -> list[bool]:
        """Of each day, whether its rows go into the shuffle's buckets as they are read: whole days train, unless the
        input is cut in another way; then both passes are needed to know which rows do."""
        whole_days = self.shuffle and not self.days and not self.fractions
        return [whole_days and day < days - 1 for day in range(days)]

    def shaping(self) -> dict:
        """The part that the manifest records."""
        return {
            "preset": asdict(self.preset), "days": self.days, "fractions": list(self.fractions),
            "shuffle": self.shuffle, "seed": self.seed, "format": self.form,
            "integers": "log(x + 1)" if formats.FORMS[self.form].logged else "unlogged; loaders take log(x + 1)",
            "bad_rows": self.bad_rows,
        }  # fmt: skip


@dataclass
class Report:
    """What a run cost: seconds by stage (of this process only), peak memory in bytes and the dictionaries' part of it;
    distinct values per column."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
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


def _job(sources: list[Source], settings: Settings) -> dict:
    """What makes an unfinished run the same run: not what is done about bad rows, as there were none so far."""
    return {
        "settings": {name: value for name, value in settings.shaping().items() if name != "bad_rows"},
        "sources": [{"file": source.path.name, "bytes": source.size} for source in sources],
        "buckets": bucket_count(_guess_rows(sources, settings.preset)) if settings.shuffle else 0,
        "cluster": settings.on_cluster,
    }


def _guess_rows(sources: list[Source], preset: Preset) -> int:
    """About how many rows will be kept."""
    rows = sum(s.size // ASSUMED_ROW_BYTES.get(s.path.suffix, ASSUMED_TEXT_ROW_BYTES) for s in sources)
    return int(rows * max(preset.sample, preset.sample_last))


def _finished(out: Path, job: dict) -> manifest.Manifest | None:
    """The manifest in `out`, if this very job made it. Raises DataError where another one did."""
    if not (out / manifest.FILE_NAME).exists():
        return None
    found = manifest.Manifest.read(out)
    sources = [{"file": source["file"], "bytes": source["bytes"]} for source in found.sources]
    settings = {name: value for name, value in found.settings.items() if name != "bad_rows"}
    if settings == job["settings"] and sources == job["sources"]:
        return found
    raise DataError(
        f"{out}: a finished data set is there already, made of other files or with other settings; "
        "choose another --out, or delete it first"
    )


def _check_space(out: Path, sources: list[Source], preset: Preset) -> None:
    """Raise DataError where the disk cannot hold what the days will become, at a rough guess of their rows."""
    need = _guess_rows(sources, preset) * (NUMBERED.itemsize + RECORD_BYTES)
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"{out}: about {need / 1e9:.0f} GB needed ({NUMBERED.itemsize} B a row while it runs, {RECORD_BYTES} B a "
            f"row of result), {free / 1e9:.0f} GB free; choose another --out"
        )


def _prepare(out: Path, job: dict, sources: list[Source], settings: Settings) -> Path:
    """The work folder, new or with an earlier run of this job in it. Raises DataError where another job's is there."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot write there ({error.strerror}); choose another --out") from error
    if (work / JOB).exists():
        there = json.loads((work / JOB).read_text())
        if there != job:
            different = [key for key in job if there.get(key) != job[key]]
            raise DataError(
                f"{work}: holds an unfinished run with other {' and '.join(different)}; "
                "repeat that command to end it, or delete this folder"
            )
        return work
    _check_space(out, sources, settings.preset)
    temporary = work / (JOB + ".part")
    temporary.write_text(json.dumps(job))
    temporary.rename(work / JOB)
    return work


def _count(
    counting: CountPass, buckets: Buckets, settings: Settings, journal: Journal, work: Path, report: Report
) -> list[int]:
    """The count pass and the vocabulary, unless an earlier run made them; returns the table sizes."""
    if not journal.all("counted"):
        with report.stage("count"):
            counts = counting.run(settings.slab_bytes, buckets)
        report.dictionary_bytes = counting.dictionary_bytes
        with report.stage("vocabulary"):
            words, ids = vocabulary.build(counts, settings.preset)
            words.save(work)
            np.savez(work / IDS, *ids)
        distinct = [len(column.keys) for column in counts.columns]
        journal.record(counted={"distinct": distinct, "table_sizes": words.table_sizes})
    (counted,) = journal.all("counted")
    report.distinct = counted["distinct"]
    return counted["table_sizes"]


def _ranges(tallies: list[Tally], settings: Settings) -> dict[str, tuple[int, int]]:
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
    return Buckets(work, job["buckets"], settings.seed, None if gathering else kept)


def _encode(
    kernels: ModuleType, counting: CountPass, buckets: Buckets, ranges: dict[str, tuple[int, int]],
    table_sizes: list[int], settings: Settings, journal: Journal, work: Path,
) -> None:  # fmt: skip
    """The encode pass, split by split; training rows come from the buckets, if rows are shuffled."""
    day_rows = [tally.kept for tally in counting.tallies]
    if settings.shuffle and not any(counting.to_buckets) and not journal.all("gathered"):
        scatter(counting.spill, buckets, day_rows, *ranges["train"], journal)
    shifts = day_shifts([tally.smallest for tally in counting.tallies], settings.preset)
    with np.load(work / IDS) as arrays:
        ids = tuple(arrays.values())
    encoding = EncodePass(
        kernels, counting.spill, buckets, day_rows, shifts, ids, table_sizes, settings.form, journal, work
    )
    finished = {event["name"] for event in journal.all("split")}
    for split, (begin, end) in ranges.items():
        if split not in finished:
            encoding.run(split, begin, end, settings.shuffle and split == "train")


def _run_on_cluster(
    work: Path, out: Path, sources: list[Source], settings: Settings, job: dict, report: Report
) -> manifest.Manifest:
    """Both passes as tasks of several processes, and the final names."""
    from gpu_etl.cluster import Cluster  # Dask: a second that other runs need not wait for

    with Cluster(sources, settings, work, job["buckets"]) as cluster:
        with report.stage("count"):
            tallies = cluster.count()
        with report.stage("vocabulary"):
            table_sizes, report.distinct = cluster.number()
        ranges = _ranges(tallies, settings)
        with report.stage("encode"):
            files = cluster.encode(ranges)
    result = _describe(sources, tallies, ranges, table_sizes, files, settings)
    _publish(work, out, result)
    return result


def _run(
    journal: Journal, work: Path, out: Path, sources: list[Source], settings: Settings, job: dict, report: Report
) -> manifest.Manifest:
    """Both passes, or what is left of them, and the final names."""
    kernels = backend.device(settings.device)
    threads = kernels.set_threads(settings.threads)
    counting = CountPass(
        kernels, sources, settings.preset, settings.seed, journal, work, threads, settings.bad_rows,
        settings.max_bad_rows, settings.to_buckets(len(sources)),
    )  # fmt: skip
    buckets = _buckets(settings, job, counting, journal, work)
    table_sizes = _count(counting, buckets, settings, journal, work, report)
    ranges = _ranges(counting.tallies, settings)
    if not journal.all("files"):
        with report.stage("encode"):
            _encode(kernels, counting, buckets, ranges, table_sizes, settings, journal, work)
        extra = formats.extra_files(settings.form, table_sizes)
        for name, text in extra.items():
            (work / name).write_text(text)
        files = {name: entry for event in journal.all("split") for name, entry in event["files"].items()}
        files |= {name: manifest.describe_file(work / name) for name in (vocabulary.FILE_NAME, *extra)}
        journal.record(files=files)
    (files,) = journal.all("files")
    result = _describe(sources, counting.tallies, ranges, table_sizes, files, settings)
    _publish(work, out, result)
    return result


def _describe(sources, tallies: list[Tally], ranges, table_sizes, files, settings: Settings) -> manifest.Manifest:
    return manifest.Manifest(
        rows={split: end - begin for split, (begin, end) in ranges.items()},
        table_sizes=table_sizes,
        settings=settings.shaping(),
        sources=[
            {
                "file": s.path.name, "bytes": s.size, "crc32": t.crc32, "rows": t.read, "dropped": t.reasons(),
                "kept": t.kept, "clicks": t.clicks, "missing": t.missing[FIRST_DENSE:].tolist(),
            }
            for s, t in zip(sources, tallies, strict=True)
        ],
        files=files,
    )


def _publish(work: Path, out: Path, description: manifest.Manifest) -> None:
    """Give all files their final names; the manifest comes last and marks the data set as whole."""
    for name in description.files:
        (out / name).parent.mkdir(exist_ok=True)
        if (work / name).exists():
            (work / name).rename(out / name)
    description.write(out)


def encode_days(inputs: list[Path], out: Path, settings: Settings) -> tuple[manifest.Manifest, Report]:
    """Encode raw day files into a data set in folder `out`. Returns its manifest and what it cost.

    Memory: a few slabs, the dictionaries, a few shuffle buckets. Disk, beside the result: 168 B a row while it runs.
    A run that was killed, or whose disk was full, goes on where it was when it is started again, and ends with the same
    bytes. Raises DataError on bad input or settings; nothing stays in `out` then, except the work done before a bad
    row, from where a run that leaves it out can go on. Raises OSError where the disk fails or is full.
    """
    settings.check(len(inputs))
    sources = open_sources(inputs)
    out, report = Path(out), Report()
    existed = out.exists()
    job = _job(sources, settings)
    result = _finished(out, job)
    if result is None:
        work = _prepare(out, job, sources, settings)
        journal = Journal(work / JOURNAL)
        report.resumed = bool(journal.events)
        try:
            if settings.on_cluster:
                result = _run_on_cluster(work, out, sources, settings, job, report)
            else:
                result = _run(journal, work, out, sources, settings, job, report)
        except DataError as error:
            if settings.on_cluster:
                raise  # tasks of other workers may still run; what they do is good for the next try
            if isinstance(error, BadRowError) and journal.all("slab"):
                raise BadRowError(
                    f"{error}. The work done before that row is kept in {work}: the same command goes on from there "
                    "with --bad-rows skip (or a higher --max-bad-rows); delete that folder to start anew"
                ) from error
            shutil.rmtree(work, ignore_errors=True)
            if not existed and not any(out.iterdir()):
                out.rmdir()
            raise
        except OSError as error:
            advice = "mend that, then give the same command again: it goes on where it was"
            raise OSError(error.errno, f"{error.strerror or error}; {advice}", error.filename or str(out)) from error
        finally:
            journal.close()
    else:
        print(f"{out}: finished already, by the same command", file=sys.stderr)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return result, report
