"""Train a DLRM in one process, on one GPU or on the CPU.

    python train.py --dataset data/set --batch_size 512 --lr 0.5 --warmup_steps 100

    python train.py --model_config official_config --dataset DIR --lr 0.1 --warmup_steps 2750 --decay_end_lr 0 \\
        --decay_steps 27772 --decay_start_step 49315 --batch_size 2048 --epochs 5     (DeepSparkHub's recipe)

    python train.py --mode predict --ckpt runs --input day_23.gz --output scores.parquet

Tests on the validation split while it trains and on the test split at the end. Words and progress go to stderr; the
last line of stdout is one JSON object. Exit status: 0; 1 after an error; 130 after Ctrl-C and 143 after SIGTERM, both
of which write a checkpoint first (--ckpt goes on from it).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from gpu_etl.common.errors import DataError
from gpu_etl.load.batch import Batch
from gpu_etl.load.dataset import DataSet, open_dataset
from gpu_etl.load.identity import meaning, rows_digest, sample
from gpu_etl.load.plain import CpuLoader
from gpu_etl.load.raw import RawDay
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.load.scores import ScoreWriter
from gpu_etl.passes.bad_rows import BadRows
from gpu_etl.raw.part_files import is_day
from gpu_etl.schema import DENSE, SPARSE
from model import memory, outcome
from model.checkpoint import files as checkpoint, runs
from model.checkpoint.manager import CheckpointManager
from model.checkpoint.runs import RunState
from model.checkpoint.state import State
from model.cli import flags, modes, options
from model.config import ConfigError, ModelConfig, read_config
from model.dlrm import DLRM
from model.layers.optimizers import Optimizer
from model.metrics import Metrics
from model.outcome import say
from model.training.device import choose_device, set_threads
from model.training.mlperf_log import MLPerfLog
from model.training.trainer import Trainer

EXPECTED = (DataError,)  # beside what outcome.explain() knows: its message says it all


def open_data(args: argparse.Namespace) -> tuple[DataSet, ModelConfig]:
    """The data set, and the model configuration that fits it: by the flags, or a trained model's by its checkpoint.

    Ids of foreign data sets are all checked here.
    """
    data = open_dataset(args.dataset, args.dataset_type)
    if args.mode != "train":
        args.ckpt = checkpoint.find(args.ckpt)
        config = checkpoint.read_state(args.ckpt).model
        check_data(args, data, config)
        return data, config
    config, path = read_config(args.model_config)
    config.check_columns(DENSE, SPARSE, str(path))
    if data.manifest:
        config, path = config.with_tables(data.manifest.table_sizes), "manifest.json"
    check_ids(data, config)
    say(f"model {args.model_config}; {sum(config.categorical_feature_sizes):,} embedding rows by {path}")
    return data, config


def check_data(args: argparse.Namespace, data: DataSet, config: ModelConfig, place: dict | None = None) -> RunState:
    """What --ckpt says of its run. Raises ConfigError or DataError where the data set is not one that its model can be
    used with, or (place: Session.place()) be trained on with; what cannot be told is said."""
    there = runs.run_state(checkpoint.read_state(args.ckpt), args.ckpt)
    given = runs.Given(data.folder, meaning(data), place, args.allow_other_data)
    for remark in runs.compare(there, given, args.ckpt):
        say(remark)
    check_ids(data, config)
    return there


def check_ids(data: DataSet, config: ModelConfig) -> None:
    """Raise DataError or ConfigError where the data set's ids are not those of the model; loaders look from now on."""
    sizes = list(config.categorical_feature_sizes)
    config.check_columns(DENSE, SPARSE, "the model")
    if data.manifest and data.manifest.table_sizes != sizes:
        raise ConfigError(
            f"{data.folder}: expected the data set that --ckpt was trained on, got one with other table sizes"
        )
    data.bound(None if config.hash_indices and not data.manifest else sizes)
    if not data.manifest and not config.hash_indices:
        rows = sum(source.rows for source in data.splits.values())
        with tqdm(total=rows, desc="check ids", unit="rows", unit_scale=True, file=sys.stderr, leave=False) as bar:
            data.check_ids(sizes, bar.update)


class Session:
    """The data, the model and what trains it, as the flags say: in one process (dist_train.py has one of many)."""

    less_memory = "lower --batch_size"

    def __init__(self, args: argparse.Namespace):
        self.args, self.claimed = args, None
        self.device = self.join()
        set_threads(args.threads)
        self.mlperf = MLPerfLog(args.mlperf_log) if args.mlperf_log and args.mode == "train" else None
        self.data, config = open_data(args)
        torch.manual_seed(args.seed)
        mlps, tables = options.optimizers(args)
        with memory.explained(memory.tables(config, tables, options.storage(args).dtype), memory.SMALLER_TABLES):
            model = self.make_model(config, tables)
        steps = -(-self.data.splits["train"].rows // args.batch_size)
        schedule, precision = options.schedule(args, steps), options.precision(args, self.device)
        table_lr = (args.embedding_lr or args.lr) / args.lr
        self.trainer = self.make_trainer(model, schedule, precision, mlps, table_lr)
        if args.cuda_graphs:
            self.trainer.use_cuda_graphs()
        self._cached: dict[tuple[str, int], ResidentLoader] = {}
        order = args.shuffle_batch_order, args.seed, args.shuffle_buffer_size
        self.loader = self.load("train", args.batch_size, *order)

    def join(self) -> torch.device:
        """The device to work on."""
        return choose_device(self.args.device)

    def make_model(self, config: ModelConfig, tables: Optimizer) -> DLRM:
        """The model with its first weights. Raises ConfigError where its tables cannot fit."""
        place = torch.device("cpu") if self.args.table_placement == "host" else self.device
        memory.check_tables(config, tables, options.storage(self.args).dtype, place)
        with self.device:
            return DLRM(config, self.args.use_embedding_ext, tables, options.storage(self.args))

    def make_trainer(self, *settings) -> Trainer:
        """What trains it."""
        return Trainer(*settings)

    def load(self, split: str, batch_size: int, *order, **share):
        """A loader of the split; of the test split where there is none of that name. share: rank and world."""
        split = split if split in self.data.splits else "test"
        found, share = (self.data.splits[split], batch_size, self.device, *order), {"ahead": self.args.prefetch} | share
        if self.args.cache == "device":
            if (split, batch_size) not in self._cached:
                self._cached[split, batch_size] = ResidentLoader(*found, **share)
            return self._cached[split, batch_size]
        if self.args.loader == "dali":
            from gpu_etl.load.dali import DaliLoader

            return DaliLoader(*found, **share)
        return CpuLoader(*found, **share)

    def restore(self, folder: Path) -> State:
        """Go on where a checkpoint is; returns its state."""
        return checkpoint.restore(folder, self.trainer)

    def meaning(self) -> dict:
        """Digests of what gives the model's inputs their meaning."""
        return meaning(self.data)

    def check_data(self, place: dict) -> RunState:
        """What --ckpt says of its run, as check_data()."""
        return check_data(self.args, self.data, self.trainer.model.config, place)

    def plan_run(self) -> runs.Run:
        """Who this run is, and which folder is to be its own."""
        return runs.plan(self.args.output_dir, self.args.ckpt)

    def claim(self, run: runs.Run, must_lock: bool) -> runs.Run:
        """Make the run's folder its own until end(); returns the run as it is then."""
        self.claimed = runs.Claim(run, must_lock)
        if self.claimed.said:
            say(self.claimed.said)
        return self.claimed.run

    def end(self) -> None:
        """Let others have what this run held."""
        if self.claimed:
            self.claimed.release()

    def fill(self) -> None:
        """Take the weights of --ckpt."""
        checkpoint.load(self.args.ckpt, self.trainer.model)

    def keep(self, *settings) -> CheckpointManager:
        """What writes checkpoints."""
        return CheckpointManager(*settings)

    def test(self, split: str) -> Metrics:
        """Exact metrics on a split."""
        loader = self.load(split, self.args.test_batch_size)
        with memory.explained(f"test on batches of {self.args.test_batch_size:,} rows", "lower --test_batch_size"):
            return self.trainer.evaluate(loader.batches(), len(loader), f"test on {split}")

    def rows_to_score(self) -> "RowsToScore":
        """What predict scores: the rows of --input."""
        args = self.args
        source = args.input or args.dataset
        if not source.is_dir() or is_day(source):
            bad_rows = BadRows(args.bad_rows, args.max_bad_rows)
            return RowsToScore(RawDay(args.dataset, source, args.unseen, bad_rows), self.device)
        data = open_dataset(source, "auto")
        check_data(args, data, self.trainer.model.config)
        return RowsToScore(None, self.device, CpuLoader(data.splits["test"], args.test_batch_size, self.device))

    def score_writer(self, labelled: bool) -> ScoreWriter:
        """What writes --output."""
        return ScoreWriter(self.args.output, labelled)

    def place(self) -> dict:
        """What a resumed run must have in common with the one before, so that its batches go on where they were."""
        args, rows = self.args, self.data.splits["train"]
        return {"rows": rows.rows, "sha256": rows_digest(self.data), "bytes": sample(rows.paths),
                "batch_size": args.batch_size, "seed": args.seed, "shuffle_batch_order": args.shuffle_batch_order,
                "shuffle_buffer_size": args.shuffle_buffer_size}  # fmt: skip


@dataclass(frozen=True)
class RowsToScore:
    """Rows for predict: a raw day's, or those that a loader has; all of the latter have labels."""

    day: RawDay | None
    device: torch.device
    loader: CpuLoader | None = None

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels."""
        return self.day is None or self.day.labelled

    def batches(self) -> Iterator[Batch]:
        """All of them, in order."""
        return self.day.batches(self.device) if self.day else self.loader.batches()

    @property
    def skipped(self) -> list[int]:
        """Numbers, from 1, of the rows so far that were left out, as they cannot be parsed."""
        return self.day.bad_row_numbers if self.day else []

    def report(self) -> dict:
        """What is to be told of them, behind the last batch."""
        if not self.day:
            return {}
        say(self.day.unseen_words())
        return {"unseen": self.day.unseen_report(), "bad_rows": dict(self.day.dropped)}


def run(args: argparse.Namespace, make_session: Callable[[argparse.Namespace], Session] = Session) -> dict:
    """Do what --mode says; returns the results."""
    options.check(args)
    if not args.dataset:
        folder = checkpoint.find(args.ckpt)
        args.dataset = Path(runs.run_state(checkpoint.read_state(folder), folder).dataset)
    session = make_session(args)
    try:
        return modes.do(session)
    finally:
        session.end()


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags. Exits with status 2 where they cannot be."""
    args = parser.parse_args(argv)
    if not args.dataset and not args.ckpt:
        parser.error("--dataset DIR: expected the data set to train on")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns the exit status."""
    args = parse(flags.build_parser(__doc__), argv)
    return outcome.run(lambda: run(args), EXPECTED, args.debug)


if __name__ == "__main__":
    sys.exit(main())
