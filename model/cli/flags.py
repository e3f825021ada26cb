"""Flags of the training scripts: those of MLPerf v0.7 and DeepSparkHub with their defaults, and a few more."""

import argparse
from pathlib import Path

import torch

from common.numbers import MOST_THREADS, number, whole
from model.cli.parser import Boolean, Parser
from model.config import names
from model.layers.embedding import PLACEMENTS
from model.layers.optimizers import NAMES

RECIPES = Path(__file__).parent.parent / "recipes"
MODES = ("train", "test", "predict", "inference_benchmark", "export")
TABLE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT32 = 3.4e38  # the largest
POSITIVE = number(most=FLOAT32, above=True)
LONGEST = 2.0**53  # of what counts steps or samples: beyond it, not every whole number is a float


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of all flags; `description` is shown above them."""
    parser = Parser(
        RECIPES, description=description,
        epilog="@FILE takes flags from a file; these come along: @"
        + ", @".join(sorted(path.stem for path in RECIPES.glob("*.flags"))),
    )  # fmt: skip
    _add_data_flags(parser.add_argument_group("data and model"))
    _add_schedule_flags(parser.add_argument_group("length and learning rate"))
    _add_optimizer_flags(parser.add_argument_group("optimisers"))
    _add_precision_flags(parser.add_argument_group("machine and precision"))
    _add_test_flags(parser.add_argument_group("tests and logs"))
    _add_checkpoint_flags(parser.add_argument_group("checkpoints"))
    _add_mode_flags(parser.add_argument_group("other modes"))
    return parser


def _add_data_flags(group) -> None:
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="DIR",
        help="data set made by `python -m gpu_etl encode` (default: the one that --ckpt was trained on)",
    )
    group.add_argument(
        "--model_config", default="official_config", metavar="NAME|FILE",
        help=f"model shape: a JSON file, or one of {', '.join(names())} (default: official_config). "
        "If the data set has a manifest, the table sizes are taken from it",
    )  # fmt: skip
    group.add_argument(
        "--dataset_type", default="auto", choices=("auto", "memmap", "bin", "dist", "dle", "torchrec"),
        help="memmap, bin: files of 160-byte records; dist, dle: split files of MLPerf v0.7 and DeepLearningExamples; "
        "torchrec: day_D_{dense,sparse,labels}.npy; auto: whatever is there (default)",
    )  # fmt: skip
    group.add_argument("--loader", default="cpu", choices=("cpu", "dali"), help="who reads batches (default: cpu)")
    group.add_argument(
        "--cache", default="none", choices=("none", "device"),
        help="device: keep whole splits in the memory of the device that trains, 160 B a row (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--prefetch", type=whole(1, 65536), default=2, metavar="N",
        help="batches read ahead; where they are small, groups of 32,768 rows (default: 2)",
    )  # fmt: skip
    group.add_argument("--batch_size", type=whole(1), default=16384, metavar="N", help="default: 16384")
    group.add_argument("--test_batch_size", type=whole(1), default=131072, metavar="N", help="default: 131072")
    group.add_argument(
        "--shuffle_batch_order", "--shuffle", action=Boolean, default=True,
        help="new order of batches in every epoch (default: true)",
    )  # fmt: skip
    group.add_argument(
        "--shuffle_buffer_size", type=whole(0), default=0, metavar="ROWS",
        help="in every epoch, let rows of batches that follow one another change places within so many rows, rounded "
        "up to whole batches; takes 160 B a row, some times over (default: 0, batches keep their rows)",
    )  # fmt: skip


def _add_schedule_flags(group) -> None:
    group.add_argument("--epochs", type=whole(1), default=1, metavar="N", help="passes over the data (default: 1)")
    group.add_argument("--lr", type=POSITIVE, default=8.0, help="learning rate at its height (default: 8)")
    group.add_argument("--warmup_steps", type=number(most=LONGEST), default=1000, metavar="N", help="default: 1000")
    group.add_argument(
        "--warmup_factor", type=whole(0, 1000), default=0, metavar="F",
        help="the warm-up starts 2^-F below the height; 0: from zero (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--decay_start_step", type=number(most=LONGEST), default=48000, metavar="N", help="default: 48000"
    )
    group.add_argument(
        "--decay_steps", type=number(most=LONGEST), default=0, metavar="N", help="0: no decay (default: 0)"
    )
    group.add_argument("--decay_power", type=whole(0, 1000), default=2, metavar="P", help="default: 2")
    group.add_argument(
        "--decay_end_lr", type=number(most=FLOAT32), default=8.0, metavar="LR",
        help="learning rate after the decay (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--schedule_unit", default="steps", choices=("steps", "samples", "epochs"),
        help="what --warmup_steps, --decay_start_step, --decay_steps count; epochs may be fractions (default: steps)",
    )  # fmt: skip


def _add_optimizer_flags(group) -> None:
    group.add_argument("--optimizer", default="sgd", choices=NAMES, help="of the MLPs (default: sgd)")
    group.add_argument("--embedding_optimizer", choices=NAMES, help="of the tables (default: as --optimizer)")
    group.add_argument(
        "--embedding_lr", type=POSITIVE, metavar="LR",
        help="learning rate of the tables at its height (default: --lr)",
    )  # fmt: skip
    group.add_argument("--eps", type=POSITIVE, help="of Adagrad and Adam (default: 1e-8; 1e-10 for adagrad)")
    group.add_argument(
        "--betas", type=number(most=1, below=True), nargs=2, default=(0.9, 0.999), metavar=("B1", "B2"),
        help="of Adam (default: 0.9 0.999)",
    )  # fmt: skip


def _add_precision_flags(group) -> None:
    group.add_argument(
        "--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: the GPU where there is one (default)"
    )
    group.add_argument(
        "--threads", type=whole(0, MOST_THREADS), default=0, metavar="N",
        help="CPU threads of torch (default: torch's choice, or the checkpoint's: another number, other last bits)",
    )  # fmt: skip
    group.add_argument(
        "--amp", action=Boolean, default=False,
        help="bfloat16 matrix products; a CPU that does float32 ones faster goes on with these (default: false)",
    )  # fmt: skip
    group.add_argument(
        "--fp16", action=Boolean, default=None,
        help="float16 matrix products with a loss scale (default: true on a GPU, false on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--loss_scale", type=POSITIVE, default=1024.0, help="for --fp16, where it starts (default: 1024)"
    )
    group.add_argument(
        "--dynamic_loss_scale", action=Boolean, default=True,
        help="halve the loss scale where gradients overflow, double it after 2,000 steps in which none did; steps that "
        "overflow are skipped either way (default: true)",
    )  # fmt: skip
    group.add_argument(
        "--cuda_graphs", action=Boolean, default=False,
        help="run each step, and each test batch, as one CUDA graph (default: false)",
    )  # fmt: skip
    group.add_argument(
        "--use_embedding_ext", action=Boolean, default=True,
        help="embedding update fused into backward; false: torch's sparse gradients (default: true)",
    )  # fmt: skip
    group.add_argument(
        "--embedding_dtype", default="float32", choices=TABLE_TYPES,
        help="type of the tables' weights; a checkpoint's are converted to it (default: float32)",
    )  # fmt: skip
    group.add_argument(
        "--stochastic_rounding",
        action=Boolean,
        default=True,
        help="of half-precision tables after a step; false: to nearest (default: true)",
    )
    group.add_argument(
        "--table_placement",
        default="device",
        choices=PLACEMENTS,
        help="host: the tables stay in host memory, and a GPU reads and writes their rows there (default: device)",
    )
    group.add_argument(
        "--seed", type=whole(-(2**63), 2**63 - 1), default=0, metavar="N",
        help="of the initial weights and the order (default: 0)",
    )  # fmt: skip
    group.add_argument("--debug", action="store_true", help="after an error, show where in the program it arose too")
    group.add_argument("--profile_steps", type=whole(0), default=0, metavar="N", help="profile N steps, then stop")


def _add_test_flags(group) -> None:
    group.add_argument("--print_freq", type=whole(0), default=0, metavar="N", help="steps between loss reports")
    group.add_argument(
        "--test_freq", type=whole(0), default=0, metavar="N",
        help="steps between tests on the validation split (default: 20 tests an epoch)",
    )  # fmt: skip
    group.add_argument("--test_after", type=number(), default=0.0, metavar="E", help="no test before E epochs")
    group.add_argument(
        "--auc_threshold", type=number(most=1), default=0.8025, metavar="A",
        help="stop once a test reaches this AUC (default: 0.8025; 1: never)",
    )  # fmt: skip
    group.add_argument(
        "--log_dir", type=Path, metavar="DIR", help="write metrics.jsonl, TensorBoard events and curves.png there"
    )
    group.add_argument("--mlperf_log", type=Path, metavar="FILE", help="write MLPerf's log (training 0.7.0) there")


def _add_checkpoint_flags(group) -> None:
    group.add_argument(
        "--output_dir", type=Path, default=Path("runs"), metavar="DIR",
        help="for checkpoints and --profile_steps; a new run that finds another run's checkpoints there writes into a "
        "folder of its own in it, run_ID (default: runs)",
    )  # fmt: skip
    group.add_argument("--save_model", action=Boolean, default=False, help="write a checkpoint at the end")
    group.add_argument("--save_freq", type=whole(0), default=0, metavar="N", help="write one every N steps")
    group.add_argument("--save_minutes", type=number(), default=0.0, metavar="M", help="write one every M minutes")
    group.add_argument(
        "--save_behind", action=Boolean, default=False, help="write them while training goes on, from a copy in memory"
    )
    group.add_argument("--keep", type=whole(1), default=3, metavar="K", help="of these, keep the last K (default: 3)")
    group.add_argument(
        "--save_best", action=Boolean, default=False, help="keep the best one by validation AUC, as OUTPUT_DIR/best"
    )
    group.add_argument(
        "--ckpt", type=Path, metavar="DIR",
        help="checkpoint to go on from or to use, or a folder of some: then the latest in it; auto: the latest in "
        "--output_dir, or none where there is none yet, so that the same command starts a run and goes on with it",
    )  # fmt: skip
    group.add_argument(
        "--allow_other_data", "--allow-other-data", action=Boolean, default=False,
        help="use --ckpt with a data set of other id maps or other rules for integers than it was trained on (say so "
        "only where you know that both mean the same), or go on with other rows or another order (default: false)",
    )  # fmt: skip


def _add_mode_flags(group) -> None:
    group.add_argument(
        "--mode", default="train", choices=MODES,
        help="train; test: score --ckpt on the test split; predict: write the scores of --input; inference_benchmark: "
        "latency and throughput; export: for other programs (default: train)",
    )  # fmt: skip
    group.add_argument("--test_only", action=Boolean, default=False, help="as --mode test")
    group.add_argument(
        "--input", type=Path, metavar="FILE|DIR",
        help="predict: a raw day (its ids come from --dataset), or a data set (default: --dataset), of which the test "
        "split is scored",
    )  # fmt: skip
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="predict: scores.parquet; export: model.pt2 (torch.export) or .onnx"
    )
    group.add_argument(
        "--unseen", choices=("rare", "popular", "error"), default="rare",
        help="predict on a raw day: category values that the data set has no id for get the id of rare ones (with "
        "preset mlperf, which has none, the first value's), or the most frequent id of their column, or are an error "
        "(default: rare)",
    )  # fmt: skip
    group.add_argument(
        "--bad_rows", "--bad-rows", choices=("error", "skip"), default="error",
        help="predict on a raw day: rows that cannot be parsed are an error, or are skipped: their line of the scores "
        "is null, so that line N stays that of row N (default: error)",
    )  # fmt: skip
    group.add_argument(
        "--max_bad_rows", "--max-bad-rows", type=whole(0), default=1000, metavar="N",
        help="with --bad_rows skip: more bad rows than that are an error (default: 1000)",
    )  # fmt: skip
    group.add_argument(
        "--inference_benchmark_batch_sizes", type=whole(1), nargs="+", default=[1, 64, 4096], metavar="B",
        help="default: 1 64 4096",
    )  # fmt: skip
    group.add_argument("--inference_benchmark_steps", type=whole(1), default=200, metavar="N", help="default: 200")
