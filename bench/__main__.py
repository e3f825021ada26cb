"""Measure what this project claims; words to stderr, one JSON line to stdout."""

import argparse
import importlib
import json
import sys

from bench import machine
from bench.command import BenchError
from common.jsonable import jsonable
from gpu_etl import outcome
from model.config import ConfigError

# Only the one that is asked for is imported: each has needs of its own.
BENCHES = {
    "quickstart": "synthetic days -> data set -> trained DLRM -> AUC beside the best there is (make run)",
    "kaggle": "real rows by facebookresearch/dlrm's recipe and by ours, mean AUC of three seeds",
    "etl": "raw text -> data set, beside a Polars pipeline that does the same work; --stages: one by one",
    "workers": "the same on two Dask workers, beside one and beside what the machine allows",
    "slab": "the encoder's functions one by one, CPU or GPU, beside pandas or cuDF",
    "kernels": "the encoder's GPU kernels compiled: registers, spills, bytes moved",
    "step_kernels": "the training step's GPU kernels: machine code, least time predicted, time on a GPU",
    "load": "data set -> batches: our loaders, DALI, DataLoaders; alone and with the training step",
    "train": "the training step, beside the machine's limits, FBGEMM's TBE and torch's EmbeddingBag",
    "scaling": "the step on 1, 2, 4 ranks: time by part, bytes sent beside the least, efficiency",
}


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser of all benchmarks, with the flags of the one that is asked for."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, dest="bench", metavar="BENCH", title="benchmarks")
    for name, line in BENCHES.items():
        command = commands.add_parser(name, help=line, formatter_class=formatter)
        if name == asked:
            bench = importlib.import_module(f"bench.{name}")
            command.description = bench.__doc__
            bench.add_flags(command)
            command.set_defaults(measure=bench.measure)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if word in BENCHES), None)
    try:
        args = build_parser(asked).parse_args(words)
        result = args.measure(args)
    except (BenchError, ConfigError) as error:
        outcome.say(f"error: {error}")
        return 1
    except BaseException as error:
        status, said = outcome.explain(error)
        outcome.say(said)
        return status
    print(json.dumps(jsonable({"bench": args.bench, **result, "machine": machine.describe()}), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
