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
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from gpu_etl.errors import DataError
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.load.dataset import DataSet, open_dataset
from gpu_etl.load.identity import meaning, rows_digest, sample
from gpu_etl.load.raw import RawDay
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.load.scores import ScoreWriter
from gpu_etl.part_files import is_day
from gpu_etl.schema import DENSE, SPARSE
from model import checkpoint, flags, inference, memory, options, runs
from model.config import ConfigError, ModelConfig, read_config
from model.device import choose_device, set_threads
from model.dlrm import DLRM
from model.engine import fit, profile
from model.keeper import Keeper
from model.logs import RunLog, jsonable, summary
from model.metrics import Metrics, measure
from model.mlperf_log import MLPerfLog
from model.optimizers import Optimizer
from model.outcome import StoppedError, explain
from model.runs import RunState
from model.state import State
from model.trainer import Trainer


def say(text: str) -> None:
    """A line of words to stderr."""
    print(text, file=sys.stderr)


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
        """The model with its first weights."""
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

    def keep(self, *settings) -> Keeper:
        """What writes checkpoints."""
        return Keeper(*settings)

    def test(self, split: str) -> Metrics:
        """Exact metrics on a split."""
        loader = self.load(split, self.args.test_batch_size)
        with memory.explained(f"test on batches of {self.args.test_batch_size:,} rows", "lower --test_batch_size"):
            return self.trainer.evaluate(loader.batches(), len(loader), f"test on {split}")

    def place(self) -> dict:
        """What a resumed run must have in common with the one before, so that its batches go on where they were."""
        args, rows = self.args, self.data.splits["train"]
        return {"rows": rows.rows, "sha256": rows_digest(self.data), "bytes": sample(rows.paths),
                "batch_size": args.batch_size, "seed": args.seed, "shuffle_batch_order": args.shuffle_batch_order,
                "shuffle_buffer_size": args.shuffle_buffer_size}  # fmt: skip


def train(session: Session) -> dict:
    """Train as the flags say, then test; returns what happened."""
    args, trainer, loader = session.args, session.trainer, session.loader
    rows = session.data.splits["train"].rows
    say(f"device {session.device}, {trainer.precision}; {rows:,} rows, {len(loader):,} steps an epoch; {loader}")
    if trainer.precision.autocast not in (None, trainer.matrices):
        say(f"matrix products in {trainer.matrices}: this CPU does them faster than {trainer.precision.autocast}")
    for remark in trainer.remarks():
        say(remark)
    if "val" not in session.data.splits:
        say("no validation split: tests on the way, --auc_threshold and --save_best go by the test split")
    run, place, best_auc = session.plan_run(), session.place(), 0.0
    args.ckpt = run.source
    if run.source:
        best_auc = go_on(session, place)
    if args.profile_steps:
        with memory.explained(f"profiling batches of {args.batch_size:,} rows", "lower --batch_size"):
            say(profile(trainer, loader, args.profile_steps, args.output_dir))
        return {"profile": str(args.output_dir / "trace.json")}
    for warning in trainer.schedule.warnings(args.epochs * len(loader)):
        say(f"warning: {warning}")
    if session.mlperf:
        session.data.drop_from_page_cache()
        session.mlperf.event("cache_clear", True)
        tests = session.data.splits.get("val", session.data.splits["test"]).rows
        session.mlperf.run(options.mlperf_settings(args, trainer.schedule, rows, tests))
    claim = None
    if args.save_model or args.save_freq or args.save_minutes or args.save_best:
        run = session.claim(run, must_lock=True)
    else:  # only a signal may ask for a checkpoint

        def claim() -> Path:
            return session.claim(run, must_lock=False).folder

    keep = replace(options.keep_options(args), folder=run.folder)
    own = runs.RunState(
        run.id, str(args.dataset.resolve()), meaning(session.data), place, torch.get_num_threads(), best_auc
    )
    keeper = session.keep(keep, trainer, asdict(own), run.source, claim)
    log = RunLog(args.log_dir, session.mlperf, run.id)
    with memory.explained(f"training on batches of {args.batch_size:,} rows", session.less_memory):
        progress = fit(trainer, loader, lambda: session.test("val"), options.loop_options(args), keeper, log)
    if session.mlperf:
        session.mlperf.stop(progress.reached)
    result = {
        "steps": trainer.steps,
        "ended": progress.ended,
        "train_seconds": round(progress.seconds, 3),
        "samples_per_second": round(progress.samples_per_second),
        "time_shares": {name: round(share, 3) for name, share in trainer.clock.shares().items()},
        "validation": [{"step": step, **asdict(found)} for step, found in progress.tests],
        "checkpoint": str(keeper.latest) if keeper.latest else None,
        "memory_bytes": trainer.memory(),
    }
    if trainer.loss_scale:
        result["loss_scale"] = trainer.loss_scale.state()
    if progress.signal:
        raise StoppedError(progress.signal, f"{progress.ended}; go on with --ckpt {keeper.latest}")
    found = session.test("test")
    log.tested(trainer.steps, trainer.steps / len(loader), found, "test")
    try:
        log.close()
    except Exception as error:  # of the files or of the plot: the training is done, and its results are to be told
        say(f"warning: {log.folder}: the logs could not be finished: {type(error).__name__}: {error}")
    say(summary(result, found))
    return {**result, "test": asdict(found)}


def go_on(session: Session, place: dict) -> float:
    """Fill the trainer with --ckpt, once it is known to fit; returns the best AUC so far."""
    args = session.args
    before = check_data(args, session.data, session.trainer.model.config, place)
    session.restore(args.ckpt)
    if warning := set_threads(args.threads, before.threads):
        say(f"warning: {warning}")
    say(f"going on from {args.ckpt}, step {session.trainer.steps:,}")
    return before.best_auc


def predict(session: Session) -> dict:
    """Write the scores of a raw day, or of a data set's test split; returns their metrics, where there are labels."""
    args = session.args
    source = args.input or args.dataset
    if source.is_dir() and not is_day(source):
        data = open_dataset(source, "auto")
        check_data(args, data, session.trainer.model.config)
        loader = CpuLoader(data.splits["test"], args.test_batch_size, session.device)
        batches, labelled, day = loader.batches(), True, None
    else:
        day = RawDay(args.dataset, source, args.unseen)
        batches, labelled = day.batches(session.device), day.labelled
    kept = []
    with ScoreWriter(args.output, labelled) as writer:
        for found, labels in inference.scores(session.trainer, tqdm(batches, desc="predict", unit="batch")):
            writer.write(found.numpy(), labels.numpy())
            kept.append((found, labels))
    found, labels = (torch.cat(column) for column in zip(*kept, strict=True))
    metrics = asdict(measure(torch.logit(found.double()), labels)) if labelled else {}
    if day:
        say(day.unseen_words())
        metrics["unseen"] = day.unseen_report()
    return {"output": str(args.output), "rows": len(found), **metrics}


def inference_benchmark(session: Session) -> dict:
    """Latency and throughput on batches of the test split."""
    sizes, steps = session.args.inference_benchmark_batch_sizes, session.args.inference_benchmark_steps
    batches = {size: [batch for batch, _ in zip(session.load("test", size).batches(), range(8), strict=False)]
               for size in sizes}  # fmt: skip
    found = inference.benchmark(session.trainer, batches, steps)
    for figures in found:
        say(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in figures.items()))
    return {"inference": found}


def export(session: Session) -> dict:
    """Write the model for other programs."""
    batch = next(session.load("test", 3).batches())
    inference.export(session.trainer.model, session.args.output, (batch.dense, batch.sparse))
    return {"output": str(session.args.output)}


def run(args: argparse.Namespace, make_session: Callable[[argparse.Namespace], Session] = Session) -> dict:
    """Do what --mode says; returns the results."""
    options.check(args)
    if not args.dataset:
        folder = checkpoint.find(args.ckpt)
        args.dataset = Path(runs.run_state(checkpoint.read_state(folder), folder).dataset)
    session = make_session(args)
    try:
        return do(args, session)
    finally:
        session.end()


def do(args: argparse.Namespace, session: Session) -> dict:
    """What --mode says."""
    result = {"command": "train", "mode": args.mode, "dataset": str(args.dataset), "device": str(session.device)}
    if args.mode == "train":
        return {**result, **train(session)}
    session.fill()
    if args.mode == "test":
        return {**result, "test": asdict(session.test("test"))}
    modes = {"predict": predict, "inference_benchmark": inference_benchmark, "export": export}
    with memory.explained(f"--mode {args.mode}", "lower --test_batch_size or --inference_benchmark_batch_sizes"):
        return {**result, **modes[args.mode](session)}


# What a user's data, settings, machine or signals may cause: a line of words, not a traceback.
EXPECTED = (DataError, ConfigError, OSError, ModuleNotFoundError, StoppedError, KeyboardInterrupt)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags. Exits with status 2 where they cannot be."""
    args = parser.parse_args(argv)
    if not args.dataset and not args.ckpt:
        parser.error("--dataset DIR: expected the data set to train on")
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns the exit status."""
    args = parse(flags.build_parser(__doc__), argv)
    try:
        print(json.dumps(jsonable(run(args)), allow_nan=False))
    except EXPECTED as error:
        status, words = explain(error)
        say(words)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
