"""Raw text -> data set with the count preset, beside a Polars pipeline that does the same work in memory."""

import argparse
import tempfile
import time
from pathlib import Path

from isal import igzip

from bench.command import run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="synthetic rows (default: 1,000,000)")


def _inflate_seconds(paths: list[Path]) -> float:
    """Time that inflating alone takes, one file after the other."""
    start = time.perf_counter()
    for path in paths:
        with igzip.open(path) as file:
            while file.read(1 << 20):
                pass
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict:
    """Encode the same rows as text, as gzip, and with Polars; each figure is a whole process, its start included.

    Ours also shuffles the training rows and writes checksums; Polars does neither.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, packed = f"{folder}/text", f"{folder}/gzip"
        run("-m", "gpu_etl", "synth", "--out", text, "--rows", args.rows, "--no-gzip")
        run("-m", "gpu_etl", "synth", "--out", packed, "--rows", args.rows)
        days = [Path(text) / f"day_{day}" for day in range(3)]
        packed_days = [Path(packed) / f"day_{day}.gz" for day in range(3)]
        run("-m", "gpu_etl", "encode", *days, "--out", f"{folder}/warm")  # compiles; the cache stays on disk
        ours = run("-m", "gpu_etl", "encode", *days, "--out", f"{folder}/ours")
        ours_gzip = run("-m", "gpu_etl", "encode", *packed_days, "--out", f"{folder}/ours_gzip")
        polars = run("-m", "bench.polars_peer", *days, "--out", f"{folder}/polars.bin")
        size = sum(path.stat().st_size for path in days)
        inflate = _inflate_seconds(packed_days)
    return {
        "rows": args.rows,
        "rows_per_second": round(args.rows / ours.seconds),
        "gigabytes_per_second": round(size / ours.seconds / 1e9, 3),
        "gzip_rows_per_second": round(args.rows / ours_gzip.seconds),
        "inflate_alone_share_of_gzip_run": round(inflate / ours_gzip.seconds, 3),
        "polars_rows_per_second": round(args.rows / polars.seconds),
        "times_polars": round(polars.seconds / ours.seconds, 2),
        "peak_megabytes": round(ours.peak_bytes / 1e6),
        "polars_peak_megabytes": round(polars.peak_bytes / 1e6),
    }
