"""What the flags ask for, as the objects that the rest of model/ takes."""

import argparse
import math
from pathlib import Path

import torch

from model.checkpoint.files import latest
from model.checkpoint.manager import CheckpointOptions
from model.cli.flags import TABLE_TYPES
from model.config import ConfigError
from model.layers.embedding import Storage
from model.layers.optimizers import Optimizer
from model.training.loop import LoopOptions
from model.training.schedule import Schedule
from model.training.trainer import Precision


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError where flags contradict each other or a number is out of range."""
    if args.amp and args.fp16:
        raise ConfigError("--amp (bfloat16) and --fp16 (float16): choose one")
    if storage(args) != Storage() and not args.use_embedding_ext:
        raise ConfigError("--embedding_dtype, --stochastic_rounding, --table_placement: only with --use_embedding_ext")
    if args.test_only:
        args.mode = "test"
    if args.ckpt == Path("auto"):
        args.ckpt = latest(args.output_dir)
    if args.mode != "train" and not args.ckpt:
        raise ConfigError(f"--mode {args.mode}: expected --ckpt DIR, the checkpoint to use")
    if args.mode in ("predict", "export") and not args.output:
        raise ConfigError(f"--mode {args.mode}: expected --output FILE")
    if args.input and args.output and args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ConfigError(f"--output {args.output}: is the --input, which would be replaced; name another file")
    if args.schedule_unit != "epochs":
        for name in ("warmup_steps", "decay_start_step", "decay_steps"):
            value = getattr(args, name)
            if value % 1:
                raise ConfigError(f"--{name}: expected a whole number of {args.schedule_unit}, got {value}")


def schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The learning-rate schedule that the flags ask for; samples and epochs become steps, rounded up."""
    unit = {"steps": 1, "samples": 1 / args.batch_size, "epochs": steps_per_epoch}[args.schedule_unit]
    lengths = args.warmup_steps, args.decay_start_step, args.decay_steps
    # Rounded to a millionth of a step first: 0.15 times 20 is a little more than 3.
    warmup, start, steps = (math.ceil(round(length * unit, 6)) for length in lengths)
    return Schedule(args.lr, warmup, args.warmup_factor, start, steps, args.decay_power, args.decay_end_lr)


def optimizers(args: argparse.Namespace) -> tuple[Optimizer, Optimizer]:
    """Those of the MLPs and of the tables."""
    names = args.optimizer, args.embedding_optimizer or args.optimizer
    return tuple(Optimizer(name, args.eps, tuple(args.betas)) for name in names)


def storage(args: argparse.Namespace) -> Storage:
    """How the tables are kept."""
    return Storage(TABLE_TYPES[args.embedding_dtype], args.stochastic_rounding, args.table_placement)


def precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """What --amp, --fp16 and the device ask for."""
    if args.amp:
        return Precision(torch.bfloat16)
    if args.fp16 or (args.fp16 is None and device.type == "cuda"):
        return Precision(torch.float16, args.loss_scale, args.dynamic_loss_scale)
    return Precision()


def loop_options(args: argparse.Namespace) -> LoopOptions:
    """How long to train, and when to report, test and stop."""
    return LoopOptions(args.epochs, args.print_freq, args.test_freq, args.test_after, args.auc_threshold)


def keep_options(args: argparse.Namespace) -> CheckpointOptions:
    """When to write checkpoints, and which to keep."""
    return CheckpointOptions(
        args.output_dir,
        args.save_freq,
        args.save_minutes,
        args.keep,
        args.save_best,
        args.save_model,
        args.save_behind,
    )


def mlperf_settings(args: argparse.Namespace, plan: Schedule, train_rows: int, eval_rows: int) -> dict:
    """What MLPerf's log tells of a run."""
    return {
        "seed": args.seed, "global_batch_size": args.batch_size, "train_samples": train_rows, "eval_samples": eval_rows,
        "opt_base_learning_rate": plan.lr, "opt_learning_rate_warmup_steps": plan.warmup_steps,
        "lr_decay_start_steps": plan.decay_start_step, "sgd_opt_base_learning_rate": plan.lr,
        "sgd_opt_learning_rate_decay_poly_power": plan.decay_power,
        "sgd_opt_learning_rate_decay_steps": plan.decay_steps,
    }  # fmt: skip
