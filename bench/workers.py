"""Encode of four text days on two single-threaded Dask workers, beside one, and beside what the machine allows."""

import argparse
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.command import BenchError, Finished, run
from gpu_etl.common.packages import require
from gpu_etl.dataset.manifest import Manifest

DAYS = 4


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--rows", type=int, default=8_000_000, metavar="N", help="synthetic rows (default: 8,000,000)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each, of which the median counts")


def _encode(days: list[Path], workers: int, out: str) -> Finished:
    words = "--workers", workers, "--threads", 1, "--device", "cpu"
    return run("-m", "gpu_etl", "encode", *days, *words, "--out", out)


def _turn(days: list[Path], out: str) -> tuple[float, float, float]:
    """Seconds of one worker, of two, and of two commands at once that know nothing of each other: one worker and half
    of the days each."""
    one, two = (_encode(days, workers, f"{out}/{workers}") for workers in (1, 2))
    if Manifest.read(Path(f"{out}/1")) != Manifest.read(Path(f"{out}/2")):  # checksums of all files
        raise BenchError("two workers wrote other bytes than one")
    halves = days[: DAYS // 2], days[DAYS // 2 :]
    with ThreadPoolExecutor(2) as both:
        apart = list(both.map(lambda half: _encode(halves[half], 1, f"{out}/half{half}"), range(2)))
    shutil.rmtree(out)
    return one.seconds, two.seconds, max(done.seconds for done in apart)


def measure(args: argparse.Namespace) -> dict:
    """Medians of whole processes, taken in turns; every turn compares the bytes.

    The machine's limit is two independent commands with half of the days each: nothing merged, nothing waited for.
    """
    require("distributed", "bench workers")
    with tempfile.TemporaryDirectory() as folder:
        run("-m", "gpu_etl", "synth", "--out", folder, "--rows", args.rows, "--days", DAYS, "--no-gzip")
        days = [Path(folder) / f"day_{day}" for day in range(DAYS)]
        _encode(days[:2], 1, f"{folder}/warm")  # compiles; the cache stays on disk
        turns = [_turn(days, f"{folder}/{turn}") for turn in range(args.repeat)]
    one, two, apart = (statistics.median(found) for found in zip(*turns, strict=True))
    return {
        "rows": args.rows,
        "repeat": args.repeat,
        "seconds": {"one_worker": round(one, 2), "two_workers": round(two, 2), "two_commands_of_half": round(apart, 2)},
        "turns": [[round(seconds, 2) for seconds in turn] for turn in turns],
        "times_one_worker": round(one / two, 2),
        "times_one_worker_at_most": round(one / apart, 2),
    }
