"""The command line of python -m gpu_etl."""

import argparse
from collections.abc import Callable
from math import nan
from pathlib import Path

from gpu_etl.backend.select import DEVICES
from gpu_etl.dataset import formats
from gpu_etl.passes import bad_rows
from gpu_etl.passes.settings import MAX_TIMEOUT, MOST_DAYS, MOST_SLAB_BYTES, MOST_THREADS, SEEDS, Settings
from gpu_etl.schema import DENSE_RULES, LAST_DAY_RULES, ORDERS, PRESETS, choose_preset

SHOWN = 40  # characters of a value

ENCODE_HELP = """Encode raw days into a data set, in two passes and bounded memory.

A DAY is a file (text, .gz, .zst or Parquet with the same 40 columns), a pattern, or a folder of day files. DIR gets
the splits' files, vocabulary.npz (the id maps) and manifest.json. All days but the last train; the first half of the
last one tests, the other half validates. A run that was killed goes on where it was when given the same command again.

presets:
  count      (default) ids by falling count from 1; seen fewer than 10 times, or missing: id 0
  mlperf     facebookresearch/dlrm: ids by first appearance from 0, all kept; missing = value 0
  torchrec   ids by first appearance from 2; rare: 1; missing = value 0; log(x - min + 2); first half validates
  dle        NVIDIA DeepLearningExamples: as count, seen fewer than 15 times; log(x + 3); half a day rounded down
  deepspark  as mlperf; days at 10 %, the last at 1 %, then 87.5 % of the negatives dropped"""


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of all commands; args.command names the one chosen."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m gpu_etl", description=description, formatter_class=formatter)
    commands = top.add_subparsers(required=True, dest="command", metavar="{encode,synth,verify,inspect,doctor}")
    encode = commands.add_parser(
        "encode", help="raw days -> data set", description=ENCODE_HELP, formatter_class=formatter
    )
    _add_encode_flags(encode)
    _add_rule_flags(encode.add_argument_group("rules of the preset, replaced one by one"))
    synth = commands.add_parser("synth", help="learnable synthetic raw days with a known best AUC")
    synth.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for day_0.gz ... and truth.json")
    synth.add_argument("--rows", type=_whole(0, 10**12), default=1_000_000, metavar="N",
                       help="rows in all (default: 1,000,000)")  # fmt: skip
    synth.add_argument("--days", type=_whole(0, MOST_DAYS), default=3, metavar="N", help="day files (default: 3)")
    synth.add_argument("--seed", type=_whole(0, 2**64 - 1), default=0, help="of the model and the rows (default: 0)")
    synth.add_argument(
        "--signal",
        type=_number(0, 1000),
        default=1.0,
        metavar="S",
        help="how much clicks depend on the row (default: 1)",
    )
    synth.add_argument("--gzip", action=argparse.BooleanOptionalAction, default=True, help="compress (default: yes)")
    verify = commands.add_parser("verify", help="check a data set against its manifest: sizes, checksums, id ranges")
    verify.add_argument("set", type=Path, metavar="DIR", help="folder of the data set")
    inspect = commands.add_parser("inspect", help="what is in a data set: label rate, missing shares, popular ids")
    inspect.add_argument("set", type=Path, metavar="DIR", help="folder of the data set")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw it too")
    _add_doctor_flags(commands.add_parser(
        "doctor", help="what is on this machine, and whether everything computes here what it should",
        description="What is on this machine, and what installs the rest; then checks, each in a process of its own: "
        "every kernel against its CPU twin, the CPU's functions against slow Python, small data sets, the loaders, "
        "the training step. Exit status 1 where one fails.",
    ))  # fmt: skip
    return top


def _add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME", help="this check, or group: machine, cuda, cpu, train")
    add("--list", action="store_true", help="name the checks, and do nothing")
    add("--timeout", type=_number(0, 10**6), default=120.0, metavar="S", help="seconds a check may take (default: 120)")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="folder whose disk is measured (default: this one)")


def _add_encode_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    add = parser.add_argument
    add("inputs", nargs="+", metavar="DAY", help="day files in order, patterns, or folders")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the data set; made if missing")
    add("--format", default=default.form, choices=formats.FORMS,
        help="records: 160-byte records; dist: split files of the MLPerf v0.7 code; dle: DeepLearningExamples' split "
        "files (default: records)")  # fmt: skip
    add("--days", type=_whole(0, MOST_DAYS), default=0, metavar="N",
        help="cut the one input file into N equal days in file order (Kaggle's train.txt: 7)")  # fmt: skip
    add("--fractions", type=_shares, default=(), metavar="A,B,C",
        help="shares of all rows that train, test and validate, instead of halving the last day")  # fmt: skip
    add("--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="shuffle the training rows; --no-shuffle keeps file order (default: shuffle)")  # fmt: skip
    add("--seed", type=_whole(*SEEDS), default=default.seed, help="of the shuffle and of sampling (default: 0)")
    add("--bad-rows", default=default.bad_rows, choices=bad_rows.RULES,
        help="stop at a bad row, or leave it out and count it (default: error)")  # fmt: skip
    add("--max-bad-rows", type=_whole(0, 2**63 - 1), default=default.max_bad_rows, metavar="N",
        help="with --bad-rows skip: more bad rows than that are an error (default: 1000)")  # fmt: skip
    add("--threads", type=_whole(0, MOST_THREADS), default=default.threads, metavar="N",
        help="CPU threads (default: all cores)")  # fmt: skip
    add("--workers", type=_whole(0, MOST_THREADS), default=default.workers, metavar="N",
        help="spread the days over N processes of this machine, one GPU each with --device cuda")  # fmt: skip
    add("--scheduler", default="", metavar="tcp://HOST:PORT",
        help="spread the days over the workers of this Dask scheduler; all must see the same folders")  # fmt: skip
    add("--security", default="", metavar="CA,CERT,KEY|FILE",
        help="TLS for --scheduler tls://HOST:PORT or --workers: PEM files, or Dask's settings as YAML")  # fmt: skip
    add("--worker-timeout", type=_number(0, MAX_TIMEOUT), default=default.worker_timeout, metavar="S",
        help="end with an error where no worker comes, or no task ends and no worker at one is heard of, for S seconds "
        "(default: 120)")  # fmt: skip
    add("--dashboard-address", default="", metavar="HOST:PORT",
        help="where Dask's dashboard listens with --workers; :PORT is all of this machine's addresses (default: "
        "127.0.0.1 and a free port)")  # fmt: skip
    add("--slab-bytes", type=_whole(0, MOST_SLAB_BYTES), default=default.slab_bytes, metavar="N",
        help="text held at a time, a few times over; never changes the output (default: 8 MiB; GPU: 64)")  # fmt: skip
    add("--memory-limit", type=_size, default=0, metavar="SIZE",
        help="with --device cuda: take no more device memory, as 40G or in bytes (default: no limit)")  # fmt: skip
    add("--keep-on-device", action=argparse.BooleanOptionalAction, default=True,
        help="with --device cuda, where all rows fit: leave them in its memory between the passes, so that a killed "
        "run begins anew; else they go through files (default: keep)")  # fmt: skip
    add("--device", default=default.device, choices=DEVICES, help="where rows are parsed and encoded")


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """Reader of a whole number within limits."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {_shown(text)}")
        return number

    return read


def _number(low: float, high: float, low_too: bool = False) -> Callable[[str], float]:
    """Reader of a finite number above `low`, or that very number where low_too says so, and up to `high`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = nan
        if not (low < number or (low_too and number == low)) or not number <= high:
            words = f"from {low} to {high}" if low_too else f"above {low}, up to {high}"
            raise argparse.ArgumentTypeError(f"expected a number {words}, got {_shown(text)}")
        return number

    return read


_id = _whole(0, 2**31 - 1)
_share = _number(0, 1, low_too=True)


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_share(share) for share in text.split(","))


def _size(text: str) -> int:
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(_number(0, 10**18, low_too=True)(number) * unit)
    except argparse.ArgumentTypeError:
        words = f"expected a size like 40G, or a number of bytes, got {_shown(text)}"
        raise argparse.ArgumentTypeError(words) from None


def _add_rule_flags(group) -> None:
    add = group.add_argument
    group.add_argument("--preset", default="count", choices=sorted(PRESETS), help="see above (default: count)")
    add("--order", choices=ORDERS, help="ids by first appearance, or by falling count")
    add("--first-id", type=_id, metavar="N", help="id of the first value")
    add("--rare-id", type=_id, metavar="N", help="id of rare values, and of missing ones unless --missing-is-zero")
    add("--missing-is-zero", action=argparse.BooleanOptionalAction, help="an empty category is the value 0")
    add("--min-count", type=_id, metavar="N", help="values seen fewer than N times are rare")
    add("--max-index-range", type=_id, metavar="N", help="take category values modulo N first; 0: off")
    add("--max-table-size", type=_id, metavar="N", help="ids below N only, the rest is rare; 0: no limit")
    add("--dense", choices=DENSE_RULES, help="clamp: max(x, 0); min: x - smallest + 1; plus2: max(x + 2, 0)")
    add("--last-day", choices=LAST_DAY_RULES, help="which half of the last day tests, and how an odd row is rounded")
    add("--sample", type=_share, metavar="S", help="share of rows kept of all days but the last")
    add("--sample-last", type=_share, metavar="S", help="share of rows kept of the last day")
    add("--drop-negatives", type=_share, metavar="S", help="share of the remaining rows with label 0 that is dropped")


RULES = (
    "order", "first_id", "rare_id", "missing_is_zero", "min_count", "max_index_range", "max_table_size", "dense",
    "last_day", "sample", "sample_last", "drop_negatives",
)  # fmt: skip


def settings(args: argparse.Namespace) -> Settings:
    """The settings that encode's flags ask for. Raises DataError for rules that cannot be."""
    return Settings(
        preset=choose_preset(args.preset, **{rule: getattr(args, rule) for rule in RULES}),
        days=args.days, fractions=args.fractions, shuffle=args.shuffle, seed=args.seed, form=args.format,
        bad_rows=args.bad_rows, max_bad_rows=args.max_bad_rows, device=args.device, threads=args.threads,
        workers=args.workers, scheduler=args.scheduler, security=args.security, worker_timeout=args.worker_timeout,
        dashboard_address=args.dashboard_address, memory_limit=args.memory_limit,
        slab_bytes=args.slab_bytes, keep_on_device=args.keep_on_device,
    )  # fmt: skip
