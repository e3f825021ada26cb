"""Flags of the training scripts: those of MLPerf v0.7 and DeepSparkHub with their defaults, and a few more."""

import argparse

import torch

from model.config import ConfigError, names
from model.engine import LoopOptions, Precision
from model.schedule import Schedule

TRUE, FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


class _Boolean(argparse.Action):
    """--flag, --noflag, --no-flag, --flag=true, --flag=false: as absl flags are written, and as argparse's are."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--{prefix}{option[2:]}" for option in option_strings for prefix in ("no", "no-")]
        self._negated = negated
        super().__init__([*option_strings, *negated], dest, nargs="?", metavar="BOOL", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        word = "true" if values is None else str(values).lower()
        if word not in TRUE + FALSE or (values is not None and option_string in self._negated):
            parser.error(f"{option_string}: expected true or false, got {values!r}")
        setattr(namespace, self.dest, (word in TRUE) != (option_string in self._negated))


def _count(least: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text!r}")
        return value

    return parse


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of all flags; `description` is shown above them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_flags(parser.add_argument_group("data and model"))
    _add_schedule_flags(parser.add_argument_group("length and learning rate"))
    _add_precision_flags(parser.add_argument_group("machine and precision"))
    _add_output_flags(parser.add_argument_group("tests, logs and checkpoints"))
    return parser


def _add_data_flags(group) -> None:
    group.add_argument("--dataset", required=True, metavar="DIR", help="data set made by `python -m gpu_etl encode`")
    group.add_argument(
        "--model_config", default="official_config", metavar="NAME|FILE",
        help=f"model shape: a JSON file, or one of {', '.join(names())} (default: official_config). "
        "If the data set has a manifest, the table sizes are taken from it",
    )  # fmt: skip
    group.add_argument(
        "--dataset_type", default="auto", choices=("auto", "memmap", "bin", "dist", "dle"),
        help="memmap, bin: files of 160-byte records; dist, dle: split files of MLPerf v0.7 and DeepLearningExamples; "
        "auto: whatever is there (default)",
    )  # fmt: skip
    group.add_argument("--loader", default="cpu", choices=("cpu", "dali"), help="who reads batches (default: cpu)")
    group.add_argument("--batch_size", type=_count(1), default=16384, metavar="N", help="default: 16384")
    group.add_argument("--test_batch_size", type=_count(1), default=131072, metavar="N", help="default: 131072")
    group.add_argument(
        "--shuffle_batch_order", "--shuffle", action=_Boolean, default=True,
        help="new order of batches in every epoch (default: true)",
    )  # fmt: skip


def _add_schedule_flags(group) -> None:
    group.add_argument("--epochs", type=_count(1), default=1, metavar="N", help="passes over the data (default: 1)")
    group.add_argument("--lr", type=float, default=8.0, help="learning rate of SGD at its height (default: 8)")
    group.add_argument("--warmup_steps", type=_count(0), default=1000, metavar="N", help="default: 1000")
    group.add_argument(
        "--warmup_factor", type=_count(0), default=0, metavar="F",
        help="the warm-up starts 2^-F below the height; 0: from zero (default: 0)",
    )  # fmt: skip
    group.add_argument("--decay_start_step", type=_count(0), default=48000, metavar="N", help="default: 48000")
    group.add_argument("--decay_steps", type=_count(0), default=0, metavar="N", help="0: no decay (default: 0)")
    group.add_argument("--decay_power", type=_count(0), default=2, metavar="P", help="default: 2")
    group.add_argument("--decay_end_lr", type=float, default=8.0, help="learning rate after the decay (default: 8)")


def _add_precision_flags(group) -> None:
    group.add_argument(
        "--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: the GPU where there is one (default)"
    )
    group.add_argument("--amp", action=_Boolean, default=False, help="bfloat16 matrix products (default: false)")
    group.add_argument(
        "--fp16", action=_Boolean, default=None,
        help="float16 matrix products with a static loss scale (default: true on a GPU, false on a CPU)",
    )  # fmt: skip
    group.add_argument("--loss_scale", type=float, default=1024.0, help="for --fp16 (default: 1024)")
    group.add_argument(
        "--use_embedding_ext", action=_Boolean, default=True,
        help="embedding update fused into backward; false: torch's sparse gradients (default: true)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the initial weights and the order (default: 0)")
    group.add_argument("--profile_steps", type=_count(0), default=0, metavar="N", help="profile N steps, then stop")


def _add_output_flags(group) -> None:
    group.add_argument("--print_freq", type=_count(0), default=0, metavar="N", help="steps between loss reports")
    group.add_argument(
        "--test_freq", type=_count(0), default=0, metavar="N", help="steps between tests (default: 20 tests an epoch)"
    )
    group.add_argument("--test_after", type=float, default=0.0, metavar="E", help="no test before E epochs")
    group.add_argument(
        "--auc_threshold", type=float, default=0.8025, metavar="A",
        help="stop once a test reaches this AUC (default: 0.8025; 1: never)",
    )  # fmt: skip
    group.add_argument("--output_dir", default="runs", metavar="DIR", help="for --save_model and --profile_steps")
    group.add_argument("--save_model", action=_Boolean, default=False, help="write a checkpoint at the end")
    group.add_argument("--ckpt", metavar="DIR", help="checkpoint to go on from, or, with --test_only, to test")
    group.add_argument("--test_only", action=_Boolean, default=False, help="only test --ckpt on the test split")


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError where flags contradict each other or a number is out of range."""
    if args.amp and args.fp16:
        raise ConfigError("--amp (bfloat16) and --fp16 (float16): choose one")
    if args.test_only and not args.ckpt:
        raise ConfigError("--test_only: expected --ckpt DIR, the checkpoint to test")
    for name in ("lr", "loss_scale"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name}: expected a number above 0, got {getattr(args, name)}")


def schedule(args: argparse.Namespace) -> Schedule:
    """The learning-rate schedule that the flags ask for."""
    return Schedule(
        args.lr, args.warmup_steps, args.warmup_factor,
        args.decay_start_step, args.decay_steps, args.decay_power, args.decay_end_lr,
    )  # fmt: skip


def precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """What --amp, --fp16 and the device ask for."""
    if args.amp:
        return Precision(torch.bfloat16)
    if args.fp16 or (args.fp16 is None and device.type == "cuda"):
        return Precision(torch.float16, args.loss_scale)
    return Precision()


def loop_options(args: argparse.Namespace) -> LoopOptions:
    """How long to train, and when to report, test and stop."""
    return LoopOptions(args.epochs, args.print_freq, args.test_freq, args.test_after, args.auc_threshold)
