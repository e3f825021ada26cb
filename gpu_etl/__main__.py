"""Raw Criteo days -> data set.

    python -m gpu_etl synth --out data/days --rows 1000000
    python -m gpu_etl encode data/days/day_0.gz data/days/day_1.gz data/days/day_2.gz --out data/set
    python -m gpu_etl verify data/set
    python -m gpu_etl inspect data/set --png data/set.png
    python -m gpu_etl doctor

Words and progress go to stderr; the last line of stdout is one JSON object. Exit status: 0; 1 after an error or a check
of doctor that fails; 2 for flags that cannot be; 130 after Ctrl-C, 143 after SIGTERM. GPU_ETL_DEBUG=1 shows where in
the code an error came from.
"""

import argparse
import os
import sys
import time

from gpu_etl import outcome, packages


def encode(args: argparse.Namespace) -> dict:
    """Run the encode command; returns its results."""
    # Threads that wait for the next parallel loop would otherwise spin on the cores where files are read and written.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from gpu_etl import flags
    from gpu_etl.inputs import expand, list_days
    from gpu_etl.pipeline import encode_days
    from gpu_etl.report import summary

    start = time.perf_counter()
    days = expand(args.inputs)
    print(list_days(days), file=sys.stderr)
    made, report = encode_days(days, args.out, flags.settings(args))
    seconds = time.perf_counter() - start
    print(summary(made, report), file=sys.stderr)
    read = sum(source["rows"] for source in made.sources)
    return {
        "out": str(args.out),
        "rows": made.rows,
        "dropped": read - sum(made.rows.values()),
        "table_rows": sum(made.table_sizes),
        "resumed": report.resumed,
        "seconds": round(seconds, 3),
        "stages": report.seconds,
        "peak_bytes": report.peak_bytes,
        "dictionary_bytes": report.dictionary_bytes,
        "device_bytes": report.device_bytes,
        "rows_per_second": round(read / seconds) if report.seconds else None,
    }


def synth(args: argparse.Namespace) -> dict:
    """Run the synth command; returns its results."""
    from gpu_etl.synthetic import write_days

    start = time.perf_counter()
    truth = write_days(args.out, rows=args.rows, days=args.days, seed=args.seed, compress=args.gzip,
                       signal=args.signal)  # fmt: skip
    return {"out": str(args.out), **truth, "seconds": round(time.perf_counter() - start, 3)}


def verify(args: argparse.Namespace) -> dict:
    """Run the verify command; returns its results."""
    from tqdm import tqdm

    from gpu_etl.verify import verify as check

    with tqdm(unit="rows", unit_scale=True, desc="verify", file=sys.stderr) as bar:
        return {"set": str(args.set), **check(args.set, bar.update)}


def inspect(args: argparse.Namespace) -> dict:
    """Run the inspect command; returns its results."""
    from tqdm import tqdm

    if args.png:
        packages.require("matplotlib", "--png")
    from gpu_etl.inspect import inspect as look
    from gpu_etl.inspect_show import plot, table

    with tqdm(unit="rows", unit_scale=True, desc="inspect", file=sys.stderr, leave=False) as bar:
        found = look(args.set, bar.update)
    print(table(found), file=sys.stderr)
    if args.png:
        plot(found, args.png)
    return {"set": str(args.set), **found}


def doctor(args: argparse.Namespace) -> dict:
    """Run the doctor command; returns its results."""
    from gpu_etl.doctor.doctor import main as examine

    return examine(args)


COMMANDS = {"encode": encode, "synth": synth, "verify": verify, "inspect": inspect, "doctor": doctor}
GO_ON = {"encode": "an encode goes on where it was when given the same command again"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    go_on = ""
    with outcome.signals():
        try:
            from gpu_etl import flags  # a second of imports, in which Ctrl-C is no traceback either

            args = flags.build_parser(__doc__).parse_args(argv)
            go_on = GO_ON.get(args.command, "")
            result = COMMANDS[args.command](args)
            outcome.print_json({"command": args.command, **result})
        except BaseException as error:
            status, words = outcome.explain(error, go_on)
            outcome.say(words)
            return status
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
