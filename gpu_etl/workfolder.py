"""The folder an encode works in: what makes a run the same run, room on the disk, and the final names."""

import json
import shutil
from pathlib import Path

from gpu_etl import manifest
from gpu_etl.errors import DataError
from gpu_etl.extract import Source
from gpu_etl.schema import RECORD_BYTES, Preset
from gpu_etl.settings import Settings, without_bad_rows
from gpu_etl.shuffle import bucket_count
from gpu_etl.spill import NUMBERED

WORK, JOB = ".work", "job.json"
ASSUMED_ROW_BYTES = {".gz": 80, ".zst": 70, ".parquet": 60}  # of such a file, to guess at its rows; text: below
ASSUMED_TEXT_ROW_BYTES = 220


def describe_job(sources: list[Source], settings: Settings) -> dict:
    """What makes an unfinished run the same run: not what is done about bad rows, as there were none so far."""
    return {
        "settings": without_bad_rows(settings.shaping()),
        "sources": [{"file": source.path.name, "bytes": source.size} for source in sources],
        "buckets": bucket_count(guess_rows(sources, settings.preset)) if settings.shuffle else 0,
        "cluster": settings.on_cluster,
    }


def guess_rows(sources: list[Source], preset: Preset) -> int:
    """About how many rows will be kept."""
    rows = sum(s.size // ASSUMED_ROW_BYTES.get(s.path.suffix, ASSUMED_TEXT_ROW_BYTES) for s in sources)
    return int(rows * max(preset.sample, preset.sample_last))


def finished(out: Path, job: dict) -> manifest.Manifest | None:
    """The manifest in `out`, if this very job made it. Raises DataError where another one did."""
    if not (out / manifest.FILE_NAME).exists():
        return None
    found = manifest.Manifest.read(out)
    sources = [{"file": source["file"], "bytes": source["bytes"]} for source in found.sources]
    if without_bad_rows(found.settings) == job["settings"] and sources == job["sources"]:
        return found
    raise DataError(
        f"{out}: a finished data set is there already, made of other files or with other settings; "
        "choose another --out, or delete it first"
    )


def _check_space(out: Path, sources: list[Source], preset: Preset) -> None:
    """Raise DataError where the disk cannot hold what the days will become, at a rough guess of their rows."""
    need = guess_rows(sources, preset) * (NUMBERED.itemsize + RECORD_BYTES)
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(
            f"{out}: about {need / 1e9:.0f} GB needed ({NUMBERED.itemsize} B a row while it runs, {RECORD_BYTES} B a "
            f"row of result), {free / 1e9:.0f} GB free; choose another --out"
        )


def prepare(out: Path, job: dict, sources: list[Source], settings: Settings) -> Path:
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


def publish(work: Path, out: Path, description: manifest.Manifest) -> None:
    """Give all files their final names; the manifest comes last and marks the data set as whole."""
    for name in description.files:
        (out / name).parent.mkdir(exist_ok=True)
        if (work / name).exists():
            (work / name).rename(out / name)
    description.write(out)
