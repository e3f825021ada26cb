"""Real rows: Criteo Kaggle by facebookresearch/dlrm's recipe (dim 16, SGD 0.1, batch 128, one epoch), and by ours."""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from bench.command import run

SAMPLE = "criteo_kaggle_137k.tsv.gz"
REFERENCE_AUC = 0.727  # facebookresearch/dlrm on the same rows and settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    samples = Path(os.environ.get("CRITEO_SAMPLES", "../shared/data"))
    parser.add_argument(
        "--input", type=Path, default=samples / SAMPLE, metavar="FILE", help="Kaggle's train.txt, or its first rows"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs to average (default: 3)")


ENCODE = {
    "facebookresearch_kaggle": ("--preset", "mlperf"),
    "criteo_kaggle": ("--min-count", 2, "--no-shuffle", "--last-day", "test-all"),
}


def measure(args: argparse.Namespace) -> dict:
    """By each recipe: encode the file as seven days, train and test once a seed; the AUCs, log losses, their means.

    facebookresearch/dlrm's recipe is tested on the first half of the last day, as MLPerf does; ours on all of it.
    """
    return {"reference_auc": REFERENCE_AUC, **{recipe: _measure(args, recipe) for recipe in ENCODE}}


def _measure(args: argparse.Namespace, recipe: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        words = "-m", "gpu_etl", "encode", args.input.resolve(), "--days", 7, *ENCODE[recipe], "--out", f"{folder}/set"
        encode = run(*words)
        tests = [
            run("train.py", "--dataset", f"{folder}/set", f"@{recipe}", "--test_freq", 1 << 30, "--seed", seed)
            for seed in range(args.seeds)
        ]
    aucs, losses = ([done.result["test"][key] for done in tests] for key in ("auc", "log_loss"))
    return {
        "rows": encode.result["rows"],
        "test_auc": aucs,
        "mean_test_auc": statistics.mean(aucs),
        "mean_log_loss": statistics.mean(losses),
        "samples_per_second": [done.result["samples_per_second"] for done in tests],
        "seconds_encode": round(encode.seconds, 1),
        "seconds_train_and_test": round(statistics.mean(done.seconds for done in tests), 1),
        "seconds_of_it_training": round(statistics.mean(done.result["train_seconds"] for done in tests), 1),
    }
