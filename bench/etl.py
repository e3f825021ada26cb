"""Raw text -> data set with the count preset, beside a Polars pipeline that does the same work in memory."""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.command import Finished, run
from gpu_etl.backend.select import DEVICES
from gpu_etl.common import codecs
from gpu_etl.common.packages import install_command, is_there


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="synthetic rows (default: 1,000,000)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="of our encode (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each, of which the median counts")
    parser.add_argument("--stages", action="store_true", help="the stages one by one instead, and what limits")


def _inflate_seconds(paths: list[Path]) -> float:
    """Time that inflating alone takes, one file after the other."""
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb") as stored, codecs.read_gzip(stored) as text:
            while text.read(1 << 20):
                pass
    return time.perf_counter() - start


def _middle(done: tuple) -> Finished | None:
    """The run of several that took the median time; None where there were none."""
    if done[0] is None:
        return None
    median = statistics.median(one.seconds for one in done)
    return min(done, key=lambda one: abs(one.seconds - median))


def measure(args: argparse.Namespace) -> dict:
    """Encode the same rows as text, as gzip, and with Polars; each figure is a whole process, its start included,
    and the median of several.

    Ours also shuffles the training rows and writes checksums; Polars does neither. With --stages: see etl_stages.
    """
    if args.stages:
        from bench import etl_stages

        return etl_stages.measure(args.rows, args.repeat)
    has_peer = is_there("polars")
    if not has_peer:
        print(f"polars is missing, so nothing stands beside: {install_command('polars')}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        text, packed = f"{folder}/text", f"{folder}/gzip"
        device = "--device", args.device
        run("-m", "gpu_etl", "synth", "--out", text, "--rows", args.rows, "--no-gzip")
        run("-m", "gpu_etl", "synth", "--out", packed, "--rows", args.rows)
        days = [Path(text) / f"day_{day}" for day in range(3)]
        packed_days = [Path(packed) / f"day_{day}.gz" for day in range(3)]
        run("-m", "gpu_etl", "encode", *days, *device, "--out", f"{folder}/warm")  # compiles; the cache stays on disk
        runs = []
        for turn in range(args.repeat):  # in turns, so that a slow minute of a shared machine hits all alike
            out = f"{folder}/{turn}"
            runs.append((
                run("-m", "gpu_etl", "encode", *days, *device, "--out", f"{out}_text"),
                run("-m", "gpu_etl", "encode", *packed_days, *device, "--out", f"{out}_gzip"),
                run("-m", "bench.polars_peer", *days, "--out", f"{out}_polars.bin") if has_peer else None,
                _inflate_seconds(packed_days),
            ))  # fmt: skip
            for path in Path(folder).glob(f"{turn}_*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        ours, ours_gzip, polars = (_middle(done) for done in list(zip(*runs, strict=True))[:3])
        inflate = statistics.median(turn[3] for turn in runs)
        size = sum(path.stat().st_size for path in days)
    return {
        "rows": args.rows,
        "device": args.device,
        "repeat": args.repeat,
        "stages": ours.result["stages"],
        "rows_per_second": round(args.rows / ours.seconds),
        "gigabytes_per_second": round(size / ours.seconds / 1e9, 3),
        "gzip_rows_per_second": round(args.rows / ours_gzip.seconds),
        "inflate_alone_share_of_gzip_run": round(inflate / ours_gzip.seconds, 3),
        "polars_rows_per_second": round(args.rows / polars.seconds) if polars else None,
        "times_polars": round(polars.seconds / ours.seconds, 2) if polars else None,
        "peak_megabytes": round(ours.peak_bytes / 1e6),
        "dictionary_megabytes": round(ours.result["dictionary_bytes"] / 1e6),
        "polars_peak_megabytes": round(polars.peak_bytes / 1e6) if polars else None,
    }
