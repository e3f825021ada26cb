"""The main job end to end: synthetic raw days -> data set -> trained DLRM -> AUC, beside the best AUC there is."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from bench.command import run

BATCH_SIZE = 128
# Found on the validation splits of seeds 0 and 1: Adam for the MLPs, plain SGD for the tables.
LR, TABLE_LR = 3e-4, 4.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), metavar="DIR", help="made anew each time")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="default: 1,000,000")
    parser.add_argument("--seed", type=int, default=0, help="of the days, the shuffle and the model (default: 0)")


def measure(args: argparse.Namespace) -> dict:
    """Run the three commands; returns their speeds and the AUC reached."""
    days, encoded = args.out / "days", args.out / "set"
    shutil.rmtree(args.out, ignore_errors=True)
    start = time.perf_counter()
    run("-m", "gpu_etl", "synth", "--out", days, "--rows", args.rows, "--days", 3, "--seed", args.seed)
    names = [days / f"day_{day}.gz" for day in range(3)]
    encode = run("-m", "gpu_etl", "encode", *names, "--out", encoded, "--seed", args.seed)
    steps = encode.result["rows"]["train"] // BATCH_SIZE
    train = run(
        "train.py", "--dataset", encoded, "--model_config", "criteo_kaggle_tiny", "--batch_size", BATCH_SIZE,
        "--test_batch_size", 16384, "--optimizer", "adam", "--lr", LR, "--embedding_optimizer", "sgd",
        "--embedding_lr", TABLE_LR,
        "--warmup_steps", steps // 16, "--decay_start_step", steps // 10,
        "--decay_steps", steps - steps // 10 + 1, "--decay_end_lr", 0, "--test_freq", max(1, steps // 5),
        "--auc_threshold", 1, "--seed", args.seed,
    )  # fmt: skip
    truth = json.loads((days / "truth.json").read_text())["test"]
    reached, best = train.result["test"]["auc"], truth["best_auc"]
    print(
        f"\ntest AUC {reached:.4f}; the best there is, {best:.4f} (without pairs of columns: "
        f"{truth['best_auc_without_pairs']:.4f}); distance {best - reached:.4f}",
        file=sys.stderr,
    )
    return {
        "test_auc": reached,
        "best_auc": best,
        "best_auc_without_pairs": truth["best_auc_without_pairs"],
        "distance": best - reached,
        "test_log_loss": train.result["test"]["log_loss"],
        "best_log_loss": truth["best_log_loss"],
        "encode_rows_per_second": encode.result["rows_per_second"],
        "train_samples_per_second": train.result["samples_per_second"],
        "seconds": round(time.perf_counter() - start, 1),
    }
