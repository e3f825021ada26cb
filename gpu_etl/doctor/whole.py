"""Checks of whole ways through the encoder and the loaders: one device, or one number of threads, against another.

python -m gpu_etl.doctor.whole encode cuda
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpu_etl.backend import select as backend
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.packages import install_command, is_there
from gpu_etl.doctor import specification
from gpu_etl.doctor.child import SkipError, outcome
from gpu_etl.doctor.samples import day_files, learnable, ragged
from gpu_etl.doctor.slab import columns, on_host, same
from gpu_etl.passes.settings import Settings
from gpu_etl.pipeline import encode_days
from gpu_etl.raw.reader import open_sources, read_day
from gpu_etl.schema import COLUMN_NAMES, FIRST_SPARSE, PRESETS, SPLITS, choose_preset, split_file

ROWS = {"cpu": 1500, "cuda": 20_000}
SEEDS = {"cpu": range(3), "cuda": range(12)}  # a fault in the keys' types showed with eight of these
SLAB_BYTES = {"cpu": 100_000, "cuda": 1 << 20}


def _files(days: list[Path], out: Path, settings: Settings) -> dict[str, bytes]:
    """A data set's files by name, made there."""
    encode_days(days, out, settings)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _equal(found: dict[str, bytes], expected: dict[str, bytes], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what}: files {sorted(expected)} expected, got {sorted(found)}"
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, f"{what}: other bytes in {', '.join(differing)}"


def encode(device: str, rows: int, folder: Path) -> None:
    """Whole data sets, by every seed, in file order, by every preset: --device cuda against the CPU; on a CPU, two
    threads and small slabs against one thread and large ones."""
    days = day_files(folder, rows)
    sampled = choose_preset("deepspark", sample=0.8, sample_last=0.7, drop_negatives=0.3)
    cases = {f"seed {seed}": Settings(seed=seed) for seed in SEEDS[device]}
    cases |= {"not shuffled": Settings(shuffle=False), "sampled": Settings(preset=sampled, seed=3)}
    cases |= {name: Settings(preset=preset, shuffle=False) for name, preset in PRESETS.items() if name != "deepspark"}
    for name, settings in cases.items():
        other = replace(settings, device=device, threads=2, slab_bytes=SLAB_BYTES[device])
        expected = _files(days, folder / f"{name} a", replace(settings, device="cpu", threads=1))
        _equal(_files(days, folder / f"{name} b", other), expected, name)


def meaning(device: str, rows: int, folder: Path) -> None:
    """Whole data sets against the specification's records, by every preset."""
    days = day_files(folder, rows)
    parsed = [specification.read_rows(day.read_bytes()) for day in days]
    for name in specification.FIRST_IDS:
        preset = PRESETS[name]
        encode_days(days, folder / name, Settings(preset=preset, shuffle=False, device=device))
        paths = [folder / name / split_file(split) for split in SPLITS]
        records = np.concatenate([np.fromfile(path, np.int32).reshape(-1, 40) for path in paths])
        expected = specification.encode_days(parsed, name, min_count=preset.min_count)
        train, last = [row for day in expected[:-1] for row in day], expected[-1]
        cut = (len(last) + (preset.last_day != "test-floor")) // 2
        halves = {tuple(map(tuple, part)) for part in (last[:cut], last[cut:])}
        same(records[: len(train)], np.array(train, np.int32), f"training rows of {name}")
        split = [np.fromfile(path, np.int32).reshape(-1, 40).tolist() for path in paths[1:]]
        assert {tuple(map(tuple, part)) for part in split} == halves, f"test and validation rows of {name}"


def _table(text: bytes):
    """The rows of a text as an Arrow table: integers as int32, categories as strings, null where empty."""
    import pyarrow as pa

    columns = list(zip(*specification.read_rows(text), strict=True))
    arrays = [pa.array(column, pa.int32()) for column in columns[:FIRST_SPARSE]]
    arrays += [
        pa.array([None if value is None else f"{value:08x}" for value in column], pa.string())
        for column in columns[FIRST_SPARSE:]
    ]
    return pa.table(arrays, names=list(COLUMN_NAMES))


def _whole_day(path: Path, kernels) -> tuple[np.ndarray, np.ndarray, int]:
    """Values int32 [n, 40], missing [n] and checksum of a day, read as this device reads it."""
    (source,) = open_sources([path])
    values, missing = [], []
    for slab in read_day(source, 0, SLAB_BYTES["cpu"], readers=kernels.readers()):
        slab.prepare(kernels)
        found, empty, faults = slab.parse(kernels, ScratchBuffer(kernels.host_bytes))
        assert not faults.any(), f"{path.name}: {np.count_nonzero(faults)} good rows found bad"
        values.append(columns(kernels, found).copy())
        missing.append(on_host(empty, len(faults)).copy())
        slab.release()
    return np.concatenate(values), np.concatenate(missing), source.crc32


def parquet(device: str, rows: int, folder: Path) -> None:
    """Parquet days hold what the same rows hold as text."""
    if device == "cuda" and not is_there("pylibcudf"):
        raise SkipError(f"cuDF is missing: {install_command('cudf')}")
    import pyarrow.parquet as pq

    text = ragged(min(rows, 2000), 1) + learnable(min(rows, 2000), 2)
    (folder / "text").write_bytes(text)
    pq.write_table(_table(text), folder / "parquet", row_group_size=700)
    expected, found = _whole_day(folder / "text", cpu), _whole_day(folder / "parquet", backend.device(device))
    for name, one, other in zip(("values", "missing fields"), found, expected, strict=False):
        same(one, other, f"{name} of Parquet")


def direct(device: str, rows: int, folder: Path) -> None:
    """Text read from storage straight into the device's memory by KvikIO."""
    if device == "cpu" or not is_there("kvikio"):
        raise SkipError("a GPU only" if device == "cpu" else f"KvikIO is missing: {install_command('kvikio')}")
    kernels = backend.device(device)
    if "text" not in kernels.readers():
        raise SkipError("KvikIO would read through the host here (compatibility mode), so encode does not use it")
    (folder / "text").write_bytes(ragged(rows, 1) + learnable(rows, 2))
    expected, found = _whole_day(folder / "text", cpu), _whole_day(folder / "text", kernels)
    for name, one, other in zip(("values", "missing fields", "checksum"), found, expected, strict=True):
        same(np.asarray(one), np.asarray(other), f"{name} of text read directly")


def loaders(device: str, rows: int, folder: Path) -> None:
    """An epoch through DALI against the plain loader, bit for bit."""
    if not is_there("nvidia.dali"):
        raise SkipError(f"DALI is missing: {install_command('nvidia.dali')}")
    from gpu_etl.load.dali import DaliLoader
    from gpu_etl.load.dataset import open_dataset
    from gpu_etl.load.plain import CpuLoader

    encode_days(day_files(folder, rows), folder / "set", Settings())
    source = open_dataset(folder / "set").splits["train"]
    for buffer in (0, 1000):
        plain, dali = (kind(source, 300, device, True, 1, buffer).batches(2) for kind in (CpuLoader, DaliLoader))
        for number, batches in enumerate(zip(plain, dali, strict=True)):
            for one, other in zip(*batches, strict=True):
                assert one.equal(other.cpu().to(one.device)), f"batch {number}, rows shuffled within {buffer}"


CHECKS: dict[str, Callable[[str, int, Path], None]] = {
    "encode": encode, "meaning": meaning, "parquet": parquet, "direct": direct, "loaders": loaders
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one check; returns the exit status, as child.py says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("device", choices=list(ROWS))
    parser.add_argument("--rows", type=int, help="of a day")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return outcome(lambda: CHECKS[args.check](args.device, args.rows or ROWS[args.device], Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
