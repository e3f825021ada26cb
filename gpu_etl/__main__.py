"""Raw Criteo days -> data set.

    python -m gpu_etl synth --out data/days --rows 1000000
    python -m gpu_etl encode data/days/day_0.gz data/days/day_1.gz data/days/day_2.gz --out data/set
    python -m gpu_etl verify data/set

Words and progress go to stderr; the last line of stdout is one JSON object. Exit status: 0, or 1 after an error.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from gpu_etl.backend import DEVICES
from gpu_etl.errors import DataError
from gpu_etl.schema import PRESETS, choose_preset

ENCODE_HELP = """Encode raw day files (text or gzip) into a data set of 160-byte records, in bounded memory.

DIR gets terabyte_processed_{train,test,val}.bin (label, 13 integers, 26 ids; int32), vocabulary.npz (the id maps) and
manifest.json. All days but the last train; the first half of the last one tests, its other half validates."""


def encode(args: argparse.Namespace) -> dict:
    """Run the encode command; returns its results."""
    from gpu_etl.pipeline import Settings, encode_days

    settings = Settings(
        preset=choose_preset(args.preset, args.min_count, args.max_index_range),
        days=args.days,
        shuffle=args.shuffle,
        seed=args.seed,
        device=args.device,
        workers=args.workers,
        slab_bytes=args.slab_bytes,
    )
    start = time.perf_counter()
    result = encode_days(args.inputs, args.out, settings)
    seconds = time.perf_counter() - start
    rows = sum(result.rows.values())
    return {
        "command": "encode",
        "out": str(args.out),
        "rows": result.rows,
        "table_rows": sum(result.table_sizes),
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds),
    }


def synth(args: argparse.Namespace) -> dict:
    """Run the synth command; returns its results."""
    from gpu_etl.synthetic import write_days

    start = time.perf_counter()
    truth = write_days(args.out, rows=args.rows, days=args.days, seed=args.seed, compress=args.gzip)
    seconds = time.perf_counter() - start
    return {"command": "synth", "out": str(args.out), **truth, "seconds": round(seconds, 3)}


def verify(args: argparse.Namespace) -> dict:
    """Run the verify command; returns its results."""
    from tqdm import tqdm

    from gpu_etl import manifest

    with tqdm(unit="rows", unit_scale=True, desc="verify", file=sys.stderr) as bar:
        return {"command": "verify", "set": str(args.set), **manifest.verify(args.set, bar.update)}


def parser() -> argparse.ArgumentParser:
    """The command line of all three commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m gpu_etl", description=__doc__, formatter_class=formatter)
    commands = top.add_subparsers(required=True, metavar="{encode,synth,verify}")

    enc = commands.add_parser(
        "encode", help="raw days -> data set", description=ENCODE_HELP, formatter_class=formatter
    )
    enc.add_argument("inputs", nargs="+", type=Path, metavar="DAY", help="day files in order, text or gzip")
    enc.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the data set; made if missing")
    enc.add_argument(
        "--preset", default="count", choices=sorted(PRESETS),
        help="count (default): ids by falling count, id 0 for rare and missing values; "
        "mlperf: ids by first appearance from 0, nothing dropped, missing = value 0 (facebookresearch/dlrm)",
    )  # fmt: skip
    enc.add_argument(
        "--min-count", type=int, metavar="N", help="values seen fewer than N times are rare (preset count: 10)"
    )
    enc.add_argument(
        "--max-index-range", type=int, metavar="N", help="take category values modulo N first (default: off)"
    )
    enc.add_argument(
        "--days", type=int, default=0, metavar="N",
        help="cut the one input file into N equal days in file order (Kaggle's train.txt: 7)",
    )  # fmt: skip
    enc.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="shuffle the training rows; --no-shuffle keeps file order (default: shuffle)",
    )  # fmt: skip
    enc.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default: 0)")
    enc.add_argument("--workers", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    enc.add_argument(
        "--slab-bytes", type=int, default=16 << 20, metavar="N",
        help="text held at a time, a few times over; never changes the output (default: 16 MiB)",
    )  # fmt: skip
    enc.add_argument("--device", default="auto", choices=DEVICES, help="where rows are parsed and encoded")
    enc.set_defaults(run=encode)

    syn = commands.add_parser("synth", help="learnable synthetic raw days with a known best AUC")
    syn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for day_0.gz ... and truth.json")
    syn.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="rows in all (default: 1,000,000)")
    syn.add_argument("--days", type=int, default=3, metavar="N", help="day files (default: 3)")
    syn.add_argument("--seed", type=int, default=0, help="seed of model and rows (default: 0)")
    syn.add_argument(
        "--gzip", action=argparse.BooleanOptionalAction, default=True, help="compress the days (default: yes)"
    )
    syn.set_defaults(run=synth)

    ver = commands.add_parser("verify", help="check a data set against its manifest: sizes, checksums, id ranges")
    ver.add_argument("set", type=Path, metavar="DIR", help="folder of the data set")
    ver.set_defaults(run=verify)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        result = args.run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
