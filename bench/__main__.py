"""Measure what this project claims; words to stderr, one JSON line to stdout.

    python -m bench quickstart    synthetic days -> data set -> trained DLRM -> AUC beside the best there is (make run)
    python -m bench kaggle        real rows by facebookresearch/dlrm's recipe and by ours, mean AUC of three seeds
    python -m bench etl           raw text -> data set, beside a Polars pipeline that does the same work
    python -m bench kernels       the encoder's GPU kernels compiled: registers, spills, bytes moved
    python -m bench load          data set -> batches: plain loader, DALI, per-row DataLoader
    python -m bench train         the training step, beside torch's EmbeddingBag with sparse gradients
    python -m bench scaling       the step on 1, 2, 4 ranks: time by part, bytes sent beside the least, efficiency
"""

import argparse
import importlib
import json
import sys

from bench import machine
from bench.command import BenchError

NAMES = ("quickstart", "kaggle", "etl", "kernels", "load", "train", "scaling")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="bench", metavar="{" + ",".join(NAMES) + "}")
    for name in NAMES:
        bench = importlib.import_module(f"bench.{name}")
        command = commands.add_parser(name, help=bench.__doc__.splitlines()[0], description=bench.__doc__)
        bench.add_flags(command)
        command.set_defaults(measure=bench.measure)
    args = parser.parse_args(argv)
    try:
        result = args.measure(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"bench": args.bench, **result, "machine": machine.describe()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
