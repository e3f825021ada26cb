"""Real rows: facebookresearch/dlrm's recipe for the Criteo Kaggle data (dim 16, SGD 0.1, batch 128, one epoch)."""

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


def measure(args: argparse.Namespace) -> dict:
    """Encode the file as seven days, then train and test once a seed; returns the AUCs and their mean."""
    with tempfile.TemporaryDirectory() as folder:
        encode = run(
            "-m", "gpu_etl", "encode", args.input.resolve(), "--days", 7, "--preset", "mlperf", "--out", f"{folder}/set"
        )
        tests = [
            run(
                "train.py", "--dataset", f"{folder}/set", "--model_config", "criteo_kaggle_tiny", "--batch_size", 128,
                "--lr", 0.1, "--warmup_steps", 0, "--auc_threshold", 1, "--test_freq", 1 << 30, "--seed", seed,
            )
            for seed in range(args.seeds)
        ]  # fmt: skip
    aucs = [done.result["test"]["auc"] for done in tests]
    return {
        "rows": encode.result["rows"],
        "test_auc": aucs,
        "mean_test_auc": statistics.mean(aucs),
        "reference_auc": REFERENCE_AUC,
        "mean_log_loss": statistics.mean(done.result["test"]["log_loss"] for done in tests),
        "samples_per_second": [done.result["samples_per_second"] for done in tests],
        "seconds_encode_and_train": round(encode.seconds + statistics.mean(done.seconds for done in tests), 1),
    }
