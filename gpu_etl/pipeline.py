"""The two passes over raw days: count (parse, spill, count values) and encode (ids, records, shuffle)."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from gpu_etl import backend, manifest, splits, vocabulary
from gpu_etl.errors import DataError
from gpu_etl.extract import Slab, Source, open_sources, prefetch, read_days
from gpu_etl.schema import COLUMNS, PRESETS, Preset, split_file
from gpu_etl.shuffle import Shuffler

WORK = ".work"
ENCODE_ROWS = 1 << 15
MIN_SLAB_BYTES = 1 << 10


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the encoded bytes (preset, days, shuffle, seed), and what does not (the rest).

    days: cut the one input file into so many days; 0: every file is a day. workers: CPU threads, 0 for all cores.
    """

    preset: Preset = PRESETS["count"]
    days: int = 0
    shuffle: bool = True
    seed: int = 0
    device: str = "auto"
    workers: int = 0
    slab_bytes: int = 16 << 20

    def check(self, inputs: int) -> None:
        """Raise DataError where a setting is out of range or does not fit the number of input files."""
        if self.slab_bytes < MIN_SLAB_BYTES:
            raise DataError(f"--slab-bytes: expected {MIN_SLAB_BYTES} or more, got {self.slab_bytes}")
        if self.workers < 0:
            raise DataError(f"--workers: expected 0 (all cores) or more, got {self.workers}")
        if self.days and (self.days < 2 or inputs != 1):
            raise DataError(
                f"--days {self.days} with {inputs} input files: expected one file to cut into 2 or more days"
            )

    def shaping(self) -> dict:
        """The part that the manifest records."""
        return {"preset": asdict(self.preset), "days": self.days, "shuffle": self.shuffle, "seed": self.seed}


class Spill:
    """Parsed rows on disk between the passes: values uint32 [n, 40] and missing uint64 [n], 168 B a row."""

    def __init__(self, folder: Path):
        self._paths = folder / "values", folder / "missing"
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 - closed in close()

    def add(self, values: np.ndarray, missing: np.ndarray) -> None:
        """Append a slab."""
        values.tofile(self._files[0])
        missing.tofile(self._files[1])

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows begin to end."""
        values = np.fromfile(self._paths[0], np.uint32, (end - begin) * COLUMNS, offset=begin * COLUMNS * 4)
        return values.reshape(-1, COLUMNS), np.fromfile(self._paths[1], np.uint64, end - begin, offset=begin * 8)

    def close(self) -> None:
        """End writing; reading goes on."""
        for file in self._files:
            file.close()


def _raise_first_fault(slab: Slab, source: Source, codes: np.ndarray, rows_before: int) -> None:
    bad = int(np.flatnonzero(codes)[0])
    raise DataError(
        f"{source.path}: row {rows_before + bad + 1}: {slab.describe(bad, codes[bad])}. "
        "Expected the Criteo format: label, 13 integers, 26 hex categories, tab-separated"
    )


def _count_pass(
    kernels: ModuleType, sources: list[Source], settings: Settings, spill: Spill, workers: int
) -> tuple[vocabulary.Counts, list[int]]:
    """Parse all days into the spill and count their values. Returns the counts and the rows of each day file."""
    counter = kernels.Counter(settings.preset, workers)
    day_rows = [0] * len(sources)
    with tqdm(total=sum(s.size for s in sources), unit="B", unit_scale=True, desc="count ", file=sys.stderr) as bar:
        for slab in prefetch(read_days(sources, settings.slab_bytes)):
            values, missing, codes = slab.parse(kernels)
            if codes.any():
                _raise_first_fault(slab, sources[slab.day], codes, day_rows[slab.day])
            spill.add(values, missing)
            counter.add(values, missing, sum(day_rows))
            day_rows[slab.day] += len(values)
            bar.set_postfix_str(f"{sum(day_rows):,} rows", refresh=False)
            bar.update(sum(s.read for s in sources) - bar.n)
    spill.close()
    return counter.result(), day_rows


def _write_split(records: Iterator[np.ndarray], path: Path) -> None:
    with open(path, "wb") as file:
        for block in records:
            block.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _encode_pass(
    kernels: ModuleType, spill: Spill, ranges: dict, lookup: vocabulary.Lookup, settings: Settings, work: Path
) -> None:
    """Encode the spill's row ranges into one file of records per split, in `work`."""

    def encoded(begin: int, end: int) -> Iterator[np.ndarray]:
        for start in range(begin, end, ENCODE_ROWS):
            stop = min(start + ENCODE_ROWS, end)
            yield kernels.encode(*spill.read(start, stop), lookup, settings.preset)
            bar.update(stop - start)

    with tqdm(total=ranges["val"][1], unit="rows", unit_scale=True, desc="encode", file=sys.stderr) as bar:
        for split, (begin, end) in ranges.items():
            records = encoded(begin, end)
            if split == "train" and settings.shuffle:
                shuffler = Shuffler(work, end - begin, settings.seed)
                for block in records:
                    shuffler.add(block)
                records = shuffler.shuffled()
            _write_split(records, work / split_file(split))


def _prepare(out: Path) -> Path:
    """Make the output folder and an empty work folder in it. Raises DataError where a finished data set is there."""
    if (out / manifest.FILE_NAME).exists():
        raise DataError(f"{out}: a finished data set is there already; choose another --out, or delete it first")
    work = out / WORK
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out}: cannot write there ({error.strerror}); choose another --out") from error
    return work


def _publish(work: Path, out: Path, description: manifest.Manifest) -> None:
    """Give all files their final names; the manifest comes last and marks the data set as whole."""
    for name in description.files:
        (work / name).rename(out / name)
    description.write(out)


def encode_days(inputs: list[Path], out: Path, settings: Settings) -> manifest.Manifest:
    """Encode raw day files into a data set in folder `out`. Returns its manifest.

    Memory: a few slabs, the vocabulary, one shuffle bucket. Disk, beside the result: 168 B a row while it runs, and
    168 B a training row for the shuffle. Raises DataError on bad input or settings; nothing stays in `out` then.
    """
    settings.check(len(inputs))
    sources = open_sources(inputs)
    kernels = backend.device(settings.device)
    workers = kernels.set_threads(settings.workers)
    out = Path(out)
    existed = out.exists()
    work = _prepare(out)
    try:
        spill = Spill(work)
        counts, day_rows = _count_pass(kernels, sources, settings, spill, workers)
        ranges = splits.plan(splits.equal_days(sum(day_rows), settings.days) if settings.days else day_rows)
        words = vocabulary.build(counts, settings.preset)
        words.save(work)
        _encode_pass(kernels, spill, ranges, words.lookup(), settings, work)
        names = [split_file(split) for split in ranges] + [vocabulary.FILE_NAME]
        described = [
            {"file": s.path.name, "bytes": s.size, "rows": n, "crc32": f"{s.crc32:08x}"}
            for s, n in zip(sources, day_rows, strict=True)
        ]
        result = manifest.Manifest(
            rows={split: end - begin for split, (begin, end) in ranges.items()},
            table_sizes=words.table_sizes,
            settings=settings.shaping(),
            sources=described,
            files={name: manifest.describe_file(work / name) for name in names},
        )
        _publish(work, out, result)
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()
