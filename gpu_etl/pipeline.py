"""Raw days -> data set: checks, the count pass, the encode pass, and the final names, each resumable."""

import json
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_etl import backend, formats, manifest, splits, vocabulary
from gpu_etl.counting import CountPass, Tally
from gpu_etl.encoding import ENCODE_ROWS, EncodePass, segments
from gpu_etl.errors import DataError
from gpu_etl.extract import Source, open_sources
from gpu_etl.journal import Journal
from gpu_etl.schema import PRESETS, RECORD_BYTES, Preset
from gpu_etl.shuffle import BUCKET_BYTES, NUMBERED
from gpu_etl.spill import MISSING_BYTES, VALUE_BYTES

WORK = ".work"
JOB, JOURNAL = "job.json", "journal.jsonl"
MIN_SLAB_BYTES = 1 << 10
BAD_ROWS = ("error", "skip")
ASSUMED_ROW_BYTES = {".gz": 80, ".zst": 70, ".parquet": 60}  # of such a file, to guess at its rows; text: below
ASSUMED_TEXT_ROW_BYTES = 400


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the encoded bytes, and what does not: device, workers, slab_bytes, max_bad_rows.

    days: cut the one input file into so many days; 0: every file is a day. fractions: shares of all rows that train,
    test and validate, in file order, instead of halving the last day. form: one of formats.FORMS. bad_rows: "error" or
    "skip", up to max_bad_rows. workers: CPU threads, 0 for all cores.
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
    workers: int = 0
    slab_bytes: int = 16 << 20

    def check(self, inputs: int) -> None:
        """Raise DataError where a setting is out of range or does not fit the number of input files."""
        self.preset.check()
        if self.slab_bytes < MIN_SLAB_BYTES:
            raise DataError(f"--slab-bytes: expected {MIN_SLAB_BYTES} or more, got {self.slab_bytes}")
        if self.workers < 0:
            raise DataError(f"--workers: expected 0 (all cores) or more, got {self.workers}")
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
    """What a run cost: seconds by stage (of this process only), peak memory in bytes, distinct values per column."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
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
    """What makes an unfinished run the same run."""
    return {
        "settings": settings.shaping(),
        "sources": [{"file": source.path.name, "bytes": source.size} for source in sources],
        "layout": [ENCODE_ROWS, BUCKET_BYTES],
    }


def _finished(out: Path, job: dict) -> manifest.Manifest | None:
    """The manifest in `out`, if this very job made it. Raises DataError where another one did."""
    if not (out / manifest.FILE_NAME).exists():
        return None
    found = manifest.Manifest.read(out)
    sources = [{"file": source["file"], "bytes": source["bytes"]} for source in found.sources]
    if found.settings == job["settings"] and sources == job["sources"]:
        return found
    raise DataError(
        f"{out}: a finished data set is there already, made of other files or with other settings; "
        "choose another --out, or delete it first"
    )


def _check_space(out: Path, sources: list[Source]) -> None:
    """Raise DataError where the disk cannot hold what the days will become, at a rough guess of their rows."""
    rows = sum(s.size // ASSUMED_ROW_BYTES.get(s.path.suffix, ASSUMED_TEXT_ROW_BYTES) for s in sources)
    need = rows * (VALUE_BYTES + MISSING_BYTES + RECORD_BYTES)
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"{out}: about {need / 1e9:.0f} GB needed ({VALUE_BYTES + MISSING_BYTES} B a row while it runs, "
            f"{NUMBERED.itemsize} B a training row to shuffle, {RECORD_BYTES} B a row of result), {free / 1e9:.0f} GB "
            "free; choose another --out"
        )


def _prepare(out: Path, job: dict, sources: list[Source]) -> Path:
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
    _check_space(out, sources)
    temporary = work / (JOB + ".part")
    temporary.write_text(json.dumps(job))
    temporary.rename(work / JOB)
    return work


def _count(counting: CountPass, settings: Settings, journal: Journal, work: Path, report: Report) -> list[int]:
    """The count pass and the vocabulary, unless an earlier run made them; returns the table sizes."""
    if not journal.all("counted"):
        with report.stage("count"):
            counts = counting.run(settings.slab_bytes)
        with report.stage("vocabulary"):
            words = vocabulary.build(counts, settings.preset)
            words.save(work)
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


def _run(
    journal: Journal, work: Path, out: Path, sources: list[Source], settings: Settings, report: Report
) -> manifest.Manifest:
    """Both passes, or what is left of them, and the final names."""
    kernels = backend.device(settings.device)
    workers = kernels.set_threads(settings.workers)
    preset, form = settings.preset, settings.form
    counting = CountPass(
        kernels, sources, preset, settings.seed, journal, work, workers, settings.bad_rows, settings.max_bad_rows
    )
    table_sizes = _count(counting, settings, journal, work, report)
    tallies = counting.tallies
    ranges = _ranges(tallies, settings)
    if not journal.all("files"):
        with report.stage("encode"):
            parts = segments([t.kept for t in tallies], [t.smallest for t in tallies], preset)
            words = vocabulary.Vocabulary.load(work)
            encoding = EncodePass(kernels, counting.spill, words, preset, parts, form, journal, work)
            for split, (begin, end) in ranges.items():
                encoding.run(split, begin, end, settings.seed if settings.shuffle and split == "train" else None)
        with report.stage("checksums"):
            extra = formats.extra_files(form, table_sizes)
            for name, text in extra.items():
                (work / name).write_text(text)
            names = [name for split in ranges for name in formats.files(form, split)]
            names += [vocabulary.FILE_NAME, *extra]
            journal.record(files={name: manifest.describe_file(work / name) for name in names})
    (files,) = journal.all("files")
    result = _describe(sources, tallies, ranges, table_sizes, files, settings)
    _publish(work, out, result)
    return result


def _describe(sources, tallies: list[Tally], ranges, table_sizes, files, settings: Settings) -> manifest.Manifest:
    return manifest.Manifest(
        rows={split: end - begin for split, (begin, end) in ranges.items()},
        table_sizes=table_sizes,
        settings=settings.shaping(),
        sources=[
            {"file": s.path.name, "bytes": s.size, "crc32": t.crc32, "rows": t.read, "dropped": t.reasons()}
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

    Memory: a few slabs, the vocabulary, a few shuffle buckets. Disk, beside the result: 168 B a row while it runs, and
    168 B a training row for the shuffle. A run that was killed, or whose disk was full, goes on where it was when it is
    started again, and ends with the same bytes. Raises DataError on bad input or settings; nothing stays in `out` then.
    Raises OSError where the disk fails or is full.
    """
    settings.check(len(inputs))
    sources = open_sources(inputs)
    out, report = Path(out), Report()
    existed = out.exists()
    job = _job(sources, settings)
    result = _finished(out, job)
    if result is None:
        work = _prepare(out, job, sources)
        journal = Journal(work / JOURNAL)
        report.resumed = bool(journal.events)
        try:
            result = _run(journal, work, out, sources, settings, report)
        except DataError:
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
