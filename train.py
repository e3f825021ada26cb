"""Train a DLRM in one process, on one GPU or on the CPU.

    python train.py --dataset data/set --batch_size 512 --lr 0.5 --warmup_steps 100

    python train.py --model_config official_config --dataset DIR --lr 0.1 --warmup_steps 2750 --decay_end_lr 0 \\
        --decay_steps 27772 --decay_start_step 49315 --batch_size 2048 --epochs 5     (DeepSparkHub's recipe)

Tests on the validation split while it trains and on the test split at the end. Words and progress go to stderr; the
last line of stdout is one JSON object. Exit status: 0, 1 after an error, 130 after Ctrl-C.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from gpu_etl.errors import DataError
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.load.dataset import DataSet, open_dataset
from model import checkpoint, flags
from model.config import ConfigError, ModelConfig, read_config
from model.device import choose_device
from model.dlrm import DLRM
from model.engine import Trainer, fit, profile


def say(text: str) -> None:
    """A line of words to stderr."""
    print(text, file=sys.stderr)


def open_data(args: argparse.Namespace) -> tuple[DataSet, ModelConfig]:
    """The data set and the model configuration that fits it; foreign data sets have all their ids checked here."""
    config, path = read_config(args.model_config)
    data = open_dataset(args.dataset, args.dataset_type)
    if data.manifest:
        config = config.with_tables(data.manifest.table_sizes)
    elif not config.hash_indices:
        rows = sum(source.rows for source in data.splits.values())
        with tqdm(total=rows, desc="check ids", unit="rows", unit_scale=True, file=sys.stderr, leave=False) as bar:
            data.check_ids(config.categorical_feature_sizes, bar.update)
    origin = "manifest.json" if data.manifest else path
    say(f"model {path}; {sum(config.categorical_feature_sizes):,} embedding rows by {origin}")
    return data, config


def run(args: argparse.Namespace) -> dict:
    """Train or test as the flags say; returns the results."""
    flags.check(args)
    device = choose_device(args.device)
    data, config = open_data(args)
    torch.manual_seed(args.seed)
    with device:
        model = DLRM(config, args.use_embedding_ext)
    trainer = Trainer(model, flags.schedule(args), flags.precision(args, device))
    Loader = CpuLoader  # noqa: N806 - a class
    if args.loader == "dali":
        from gpu_etl.load.dali import DaliLoader as Loader
    loader = Loader(data.splits["train"], args.batch_size, device, args.shuffle_batch_order, args.seed)
    say(f"device {device}, {trainer.precision}; {data.splits['train'].rows:,} rows, {len(loader):,} steps an epoch")

    place = {"rows": data.splits["train"].rows, "batch_size": args.batch_size, "seed": args.seed,
             "shuffle_batch_order": args.shuffle_batch_order}  # fmt: skip
    if args.ckpt:
        state = checkpoint.load(args.ckpt, model)
        if not args.test_only:
            trainer.steps = resume(state, place, args.ckpt)

    def test(split: str):
        tester = Loader(data.splits.get(split, data.splits["test"]), args.test_batch_size, device)
        return trainer.evaluate(tester.batches(), len(tester), f"test on {split}")

    result = {"command": "train", "dataset": str(args.dataset), "device": str(device)}
    if args.profile_steps:
        say(profile(trainer, loader, args.profile_steps, Path(args.output_dir)))
        return {**result, "profile": str(Path(args.output_dir) / "trace.json")}
    if not args.test_only:
        result |= train(args, trainer, loader, test)
        if args.save_model:
            folder = Path(args.output_dir) / f"step_{trainer.steps}"
            checkpoint.save(folder, model, {"steps": trainer.steps, "place": place})
            result["checkpoint"] = str(folder)
    return {**result, "test": asdict(test("test"))}


def train(args, trainer: Trainer, loader, test) -> dict:
    """Train as the flags say; returns what happened."""
    for warning in trainer.schedule.warnings(args.epochs * len(loader)):
        say(f"warning: {warning}")
    progress = fit(trainer, loader, lambda: test("val"), flags.loop_options(args))
    return {
        "steps": trainer.steps,
        "ended": progress.ended,
        "train_seconds": round(progress.seconds, 3),
        "samples_per_second": round(progress.samples_per_second),
        "validation": [{"step": step, **asdict(found)} for step, found in progress.tests],
    }


def resume(state: dict, place: dict, ckpt: str) -> int:
    """Steps done by the checkpoint. Raises ConfigError where its data or order are not those of this run."""
    if state["place"] != place:
        raise ConfigError(f"--ckpt {ckpt}: cannot go on: made with {state['place']}, this run has {place}")
    return state["steps"]


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns the exit status."""
    args = flags.build_parser(__doc__).parse_args(argv)
    try:
        print(json.dumps(run(args)))
    except (DataError, ConfigError) as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error.filename or ''}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
