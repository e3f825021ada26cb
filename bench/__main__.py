"""Measure what this project claims; words to stderr, one JSON line to stdout.

    python -m bench quickstart    synthetic days -> data set -> trained DLRM -> AUC beside the best there is (make run)
    python -m bench kaggle        real rows by facebookresearch/dlrm's recipe and by ours, mean AUC of three seeds
    python -m bench etl           raw text -> data set, beside a Polars pipeline that does the same work
    python -m bench workers       the same on two Dask workers, beside one and beside what the machine allows
    python -m bench slab          the encoder's functions one by one, CPU or GPU, beside pandas or cuDF
    python -m bench kernels       the encoder's GPU kernels compiled: registers, spills, bytes moved
    python -m bench step_kernels  the training step's GPU kernels: machine code, least time predicted, time on a GPU
    python -m bench load          data set -> batches: our loaders, DALI, DataLoaders; alone and with the training step
    python -m bench train         the training step, beside the machine's limits, FBGEMM's TBE and torch's EmbeddingBag
    python -m bench scaling       the step on 1, 2, 4 ranks: time by part, bytes sent beside the least, efficiency
"""

import argparse
import importlib
import json
import sys

from bench import machine
from bench.command import BenchError

NAMES = ("quickstart", "kaggle", "etl", "workers", "slab", "kernels", "step_kernels", "load", "train", "scaling")


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
