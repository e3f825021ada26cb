"""The folder an encode works in: what makes a run the same run, what in it is ours, room on the disk."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Required, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from common import typed
from gpu_etl import backend, formats, manifest, vocabulary
from gpu_etl.errors import DataError, KeepWorkError, WorkDamagedError
from gpu_etl.integrity import identity, read_json, write_json
from gpu_etl.journal import Journal
from gpu_etl.numbered import NUMBERED
from gpu_etl.schema import RECORD_BYTES, Preset
from gpu_etl.settings import Settings, without_bad_rows
from gpu_etl.shuffle import bucket_count
from gpu_etl.source import Source
from gpu_etl.sources import Recorded, Stamp, check_same, located, unproven

WORK, JOB, JOURNAL = ".work", "job.json", "journal.jsonl"
ASSUMED_ROW_BYTES = {".gz": 80, ".zst": 70, ".parquet": 60}  # of such a file, to guess at its rows; text: below
ASSUMED_TEXT_ROW_BYTES = 220
_OURS = re.compile(
    r"(job\.json|journal\.jsonl|parts\.json|keys|rows_\d+|bucket_\d+|vocabulary\.npz|ids\.npz|"
    r"counts\.npz|merged_\d+_\d+\.npz|check)(\.\d+)?(\.part(\.npz)?)?"
)
_PART = re.compile(r"part_\d+")
_SPLIT_FILES = {name for form in formats.FORMS for name in formats.expected_files(form)}
Result = TypeVar("Result")
MOST_BUCKETS = 1 << 20


class JobEntry(TypedDict, total=False):
    """What JOB holds, but for "files"; see describe_job()."""

    __pydantic_config__ = typed.STRICT
    settings: Required[dict[str, Any]]
    sources: Required[list[dict[str, Any]]]
    buckets: Required[Annotated[int, Field(ge=0, le=MOST_BUCKETS)]]
    cluster: Required[bool]
    stamps: list[Any]  # of older versions


def describe_job(sources: list[Source], settings: Settings) -> dict:
    """What makes an unfinished run the same run: not what is done about bad rows, as there were none so far.

    A bucket of the shuffle suits the device, or a task where there are many, on any device.
    """
    size = backend.bucket_bytes("cpu" if settings.on_cluster else settings.device)
    return {
        "settings": without_bad_rows(settings.shaping()),
        "sources": [_describe_source(source) for source in sources],
        "buckets": bucket_count(guess_rows(sources, settings.preset), size) if settings.shuffle else 0,
        "cluster": settings.on_cluster,
    }


def _describe_source(source: Source) -> dict:
    """What the job says of a day; of part files, as the place that a run has come to is one in a file, each."""
    try:
        source.path.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{source.path}: the name is not UTF-8, as a manifest's must be; rename it") from None
    found = {"file": source.path.name, "bytes": source.size}
    return found | {"parts": [[part.path.name, part.size] for part in source.parts]} if source.parts else found


def guess_rows(sources: list[Source], preset: Preset) -> int:
    """About how many rows will be kept."""
    files = [file for source in sources for file in source.files]
    rows = sum(file.size // ASSUMED_ROW_BYTES.get(file.path.suffix, ASSUMED_TEXT_ROW_BYTES) for file in files)
    return int(rows * max(preset.sample, preset.sample_last))


def finished(out: Path, job: dict, sources: list[Source]) -> manifest.Manifest | None:
    """The manifest in `out`, if this very job made it, of the bytes that the sources have now, all of which are read
    then. Raises DataError where another one did, and where files of the data set are missing or cut off."""
    if not (out / manifest.FILE_NAME).exists():
        return None
    found = manifest.Manifest.read(out)
    named = [{"file": source["file"], "bytes": source["bytes"]} for source in found.sources]
    wanted = [{"file": source.path.name, "bytes": source.size} for source in sources]
    if without_bad_rows(found.settings) != job["settings"] or named != wanted:
        raise DataError(
            f"{out}: a finished data set is there already, made of other files or with other settings; "
            "choose another --out, or delete it first"
        )
    for name, entry in found.files.items():
        size = (out / name).stat().st_size if (out / name).is_file() else None
        if size != entry["bytes"]:
            raise DataError(
                f"{out / name}: expected {entry['bytes']} bytes by the manifest, found {size or 'no file'}; the data "
                "set is damaged: delete it, and give the same command again"
            )
    check_same(sources, [source["crc32"] for source in found.sources], out)
    return found


def _check_space(out: Path, sources: list[Source], preset: Preset) -> None:
    """Raise DataError where the disk cannot hold what the days will become, at a rough guess of their rows."""
    need = guess_rows(sources, preset) * (NUMBERED.itemsize + RECORD_BYTES)
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"{out}: about {need / 1e6:,.1f} MB needed ({NUMBERED.itemsize} B a row while it runs, {RECORD_BYTES} B a "
            f"row of result), {free / 1e6:,.1f} MB free; choose another --out"
        )


def _read_job(work: Path) -> dict | None:
    """What begin() wrote; None where there is no such file. Raises WorkDamagedError where it is something else."""
    found = read_json(work / JOB)
    if isinstance(found, dict):  # "files" holds paths, which JSON's reader takes only as far as they are UTF-8
        typed.read(JobEntry, {key: found[key] for key in found if key != "files"}, str(work / JOB), WorkDamagedError)
        days = found.get("files", [])
        if isinstance(days, list) and all(isinstance(day, list) and all(map(_is_stamped, day)) for day in days):
            return found
    if found is not None:
        raise WorkDamagedError(f"{work / JOB}: damaged, or not what this tool wrote there")
    return None


def _is_stamped(file) -> bool:
    """Whether this is a path and the two numbers of its stamp."""
    return isinstance(file, list) and [type(value) for value in file] == [str, int, int]


def prepare(out: Path, job: dict, sources: list[Source], settings: Settings) -> Path:
    """The work folder, new or with an earlier run of this job in it, for begin(). Raises DataError where another job's
    is there, and where there are files that the data set's would replace."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot write there ({error.strerror}); choose another --out") from error
    try:
        there = _read_job(work)
    except WorkDamagedError:
        return work  # begin() says so
    if there is not None:
        job["buckets"] = there.get("buckets", job["buckets"])  # whatever suits this device
        different = [key for key in job if there.get(key) != job[key]]
        if different:
            raise DataError(
                f"{work}: holds an unfinished run with other {' and '.join(different)}; "
                "repeat that command to end it, or delete this folder"
            )
    elif not (work / JOURNAL).exists():
        _refuse_foreign(out, settings)
        _check_space(out, sources, settings.preset)
    return work


def _refuse_foreign(out: Path, settings: Settings) -> None:
    """Raise DataError where a file of the data set would take the place of one that is there."""
    for name in [*formats.expected_files(settings.form), vocabulary.FILE_NAME]:
        if (out / name).exists():
            raise DataError(
                f"{out / name}: there is such a file already, without a {manifest.FILE_NAME} that says where it comes "
                "from, and it is not replaced; move it away, or choose another --out"
            )


def begin(work: Path, journal: Journal, job: dict, sources: list[Source]) -> None:
    """Bring the work folder of an open journal to a state that can be built on: what an earlier run of the job left, if
    it is proven that the day files are those that it read; else an empty one, which is said.

    Raises KeepWorkError where the folder holds files of unknown origin under the names that are used there.
    """
    reason = _why_anew(work, journal, job, sources)
    if reason:
        print(f"{reason}; the run begins anew", file=sys.stderr)
        clear(work, journal)
    files = [[[path, *stamp] for path, stamp in located(source)] for source in sources]
    write_json(work / JOB, job | {"files": files})
    if not journal.events:
        journal.record(job=identity(job))


def _why_anew(work: Path, journal: Journal, job: dict, sources: list[Source]) -> str | None:
    """Why what is in the work folder cannot be built on, in words; None where it can, or where nothing is there."""
    ours = bool(journal.all("job"))
    try:
        there = _read_job(work)
        reason = f"{work / JOB}: no such file, beside the work of an earlier run" if there is None else None
    except WorkDamagedError as error:
        there, reason = None, str(error)
    first = JOB, f"{JOB}.part", JOURNAL  # a run that was killed at once left no more
    left = [path.name for path in work.iterdir() if is_ours(path.name) and path.name not in first]
    if there is None:
        if left and not ours:
            raise KeepWorkError(
                f"{work}: holds {', '.join(sorted(left)[:3])}, but nothing that says that this tool wrote them; move "
                "or delete that folder, or choose another --out"
            )
        return reason if left or ours or (work / JOB).exists() else None
    if not journal.events:
        return f"{work / JOURNAL}: empty or missing, beside the work of an earlier run" if left else None
    if journal.events[0].get("job") != identity(job):
        return f"{work / JOURNAL}: the journal of another run"
    if "files" not in there:
        return f"{work / JOB}: written by an older version of this tool"
    changed = unproven(sources, _recorded(journal, there["files"], job["cluster"]))
    if changed:
        return (
            f"{', '.join(map(str, changed))}: not proven to be the bytes that the unfinished run in {work} has read "
            "(another path or time of change, and another checksum or none yet)"
        )
    return None


def _recorded(journal: Journal, days: list[list], cluster: bool) -> list[Recorded]:
    """What the earlier run wrote down of the day files. Of a cluster's, the checksums are in other journals."""
    crcs = {event["day"]: event["crc32"] for event in journal.all("day")}
    begun = {event["day"] for event in journal.all("slab")}
    return [
        Recorded(
            [(path, Stamp(*stamp)) for path, *stamp in files], crcs.get(day),
            begun=cluster or day in begun or day in crcs,
        )
        for day, files in enumerate(days)
    ]  # fmt: skip


def until_sound(work: Path, journal: Journal, job: dict, sources: list[Source], run: Callable[[], Result]) -> Result:
    """What run() returns. Where it finds the work of an earlier run damaged, that is removed, which is said, and it
    runs once more. Raises WorkDamagedError where work that is not older than this process is damaged, too."""
    begin(work, journal, job, sources)
    try:
        return run()
    except FileNotFoundError as error:
        if not error.filename or work.resolve() not in Path(error.filename).resolve().parents:
            raise
        reason = f"{error.filename}: no such file, but an earlier run wrote it"
    except WorkDamagedError as error:
        reason = str(error)
    print(f"{reason}; the run begins anew", file=sys.stderr)
    clear(work, journal)
    begin(work, journal, job, sources)
    try:
        return run()
    except WorkDamagedError as error:
        raise WorkDamagedError(
            f"{error}; this happened to files that this very run wrote: check that disk, or choose another --out"
        ) from error


def is_ours(name: str) -> bool:
    """Whether a file or folder of this name, relative to a work folder, is one that an encode makes there."""
    first, *rest = Path(name).parts
    if _PART.fullmatch(first):
        return not rest or is_ours(str(Path(*rest)))
    return name in _SPLIT_FILES or bool(_OURS.fullmatch(name))


def clear(work: Path, journal: Journal | None = None) -> None:
    """Remove what an encode makes in a work folder, and the folders that are empty then; the journal given is emptied
    and stays."""
    if not work.is_dir():
        return
    if journal is not None:
        journal.clear()
    for path in sorted(work.rglob("*"), reverse=True):  # a folder comes behind what is in it
        name = str(path.relative_to(work))
        if path.is_dir() and not path.is_symlink():
            folder_of_ours = _PART.fullmatch(name) or any(file.startswith(f"{name}/") for file in _SPLIT_FILES)
            if folder_of_ours and not any(path.iterdir()):
                path.rmdir()
        elif is_ours(name) and not (journal is not None and name == JOURNAL):
            path.unlink(missing_ok=True)


def remove(work: Path) -> None:
    """Remove a work folder with what an encode makes in it; what else is there stays, which is said."""
    clear(work)
    if work.is_dir():
        left = sorted(path.name for path in work.iterdir())
        if left:
            print(f"{work}: not made by this tool, and left there: {', '.join(left)}", file=sys.stderr)
        else:
            work.rmdir()
