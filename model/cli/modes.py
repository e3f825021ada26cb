"""What a session (train.Session) does in each mode; its data, its model and its trainer are there already."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from model import inference, memory
from model.checkpoint import runs
from model.cli import options
from model.config import ConfigError
from model.metrics import measure
from model.outcome import StoppedError, say
from model.training.device import set_threads
from model.training.loop import fit, profile
from model.training.run_log import RunLog, summary


def do(session) -> dict:
    """What --mode says; returns the results."""
    args = session.args
    result = {"command": "train", "mode": args.mode, "dataset": str(args.dataset), "device": str(session.device)}
    if args.mode == "train":
        return {**result, **train(session)}
    session.fill()
    if args.mode == "test":
        return {**result, "test": asdict(session.test("test"))}
    modes = {"predict": predict, "inference_benchmark": inference_benchmark, "export": export}
    with memory.explained(f"--mode {args.mode}", "lower --test_batch_size or --inference_benchmark_batch_sizes"):
        return {**result, **modes[args.mode](session)}


def train(session) -> dict:
    """Train as the flags say, then test; returns what happened."""
    args, trainer, loader = session.args, session.trainer, session.loader
    describe(session)
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
        begin_mlperf(session)
    dataset, threads = str(args.dataset.resolve()), torch.get_num_threads()
    own = runs.RunState(run.id, dataset, session.meaning(), place, threads, best_auc)
    keeper = make_keeper(session, run, asdict(own))
    log = RunLog(args.log_dir, session.mlperf, run.id)
    with memory.explained(f"training on batches of {args.batch_size:,} rows", session.less_memory):
        progress = fit(trainer, loader, lambda: session.test("val"), options.loop_options(args), keeper, log)
    if session.mlperf:
        session.mlperf.stop(progress.reached)
    result = results(trainer, progress, keeper.latest)
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


def describe(session) -> None:
    """Say what trains on what."""
    trainer, rows = session.trainer, session.data.splits["train"].rows
    steps = f"{rows:,} rows, {len(session.loader):,} steps an epoch"
    say(f"device {session.device}, {trainer.precision}; {steps}; {session.loader}")
    if trainer.precision.autocast not in (None, trainer.matrices):
        say(f"matrix products in {trainer.matrices}: this CPU does them faster than {trainer.precision.autocast}")
    for remark in trainer.remarks():
        say(remark)
    if "val" not in session.data.splits:
        say("no validation split: tests on the way, --auc_threshold and --save_best go by the test split")


def begin_mlperf(session) -> None:
    """The first lines of MLPerf's log."""
    splits = session.data.splits
    session.data.drop_from_page_cache()
    session.mlperf.event("cache_clear", True)
    tests = splits.get("val", splits["test"]).rows
    settings = options.mlperf_settings(session.args, session.trainer.schedule, splits["train"].rows, tests)
    session.mlperf.run(settings)


def make_keeper(session, run: runs.Run, state: dict):
    """What writes the run's checkpoints; its folder is claimed now, or, where only a signal may ask for one, then."""
    args, claim = session.args, None
    if args.save_model or args.save_freq or args.save_minutes or args.save_best:
        run = session.claim(run, must_lock=True)
    else:

        def claim() -> Path:
            return session.claim(run, must_lock=False).folder

    keep = replace(options.keep_options(args), folder=run.folder)
    return session.keep(keep, session.trainer, state, run.source, claim)


def results(trainer, progress, latest: Path | None) -> dict:
    """What is told of a training."""
    found = {
        "steps": trainer.steps,
        "ended": progress.ended,
        "train_seconds": round(progress.seconds, 3),
        "samples_per_second": round(progress.samples_per_second),
        "time_shares": {name: round(share, 3) for name, share in trainer.clock.shares().items()},
        "validation": [{"step": step, **asdict(test)} for step, test in progress.tests],
        "checkpoint": str(latest) if latest else None,
        "memory_bytes": trainer.memory(),
    }
    return found | ({"loss_scale": trainer.loss_scale.state()} if trainer.loss_scale else {})


def go_on(session, place: dict) -> float:
    """Fill the trainer with --ckpt, once it is known to fit; returns the best AUC so far."""
    args = session.args
    before = session.check_data(place)
    session.restore(args.ckpt)
    if warning := set_threads(args.threads, before.threads):
        say(f"warning: {warning}")
    say(f"going on from {args.ckpt}, step {session.trainer.steps:,}")
    return before.best_auc


def predict(session) -> dict:
    """Write the scores of a raw day, or of a data set's test split; returns their metrics, where there are labels."""
    rows, kept = session.rows_to_score(), []
    with session.score_writer(rows.labelled) as writer:
        for found, labels in inference.scores(session.trainer, tqdm(rows.batches(), desc="predict", unit="batch")):
            writer.write(found.numpy(), labels.numpy(), rows.skipped)
            kept.append((found, labels))
        if not kept:
            what = "all of its rows are bad ones" if rows.skipped else "it has no rows"
            raise ConfigError(f"{session.args.input or session.args.dataset}: nothing to score: {what}")
        none = torch.zeros(0)
        writer.write(none.numpy(), none.numpy(), rows.skipped)  # those behind the last good one
    scores, labels = (torch.cat(column) for column in zip(*kept, strict=True))
    metrics = asdict(measure(torch.logit(scores.double()), labels)) if rows.labelled else {}
    if rows.skipped:
        say(f"{len(rows.skipped):,} rows could not be parsed: their scores are null, in their places")
    told = {"output": str(session.args.output), **metrics, "rows": writer.rows, "scored": len(scores)}
    return {**told, **rows.report()}


def inference_benchmark(session) -> dict:
    """Latency and throughput on batches of the test split."""
    sizes, steps = session.args.inference_benchmark_batch_sizes, session.args.inference_benchmark_steps
    batches = {size: [batch for batch, _ in zip(session.load("test", size).batches(), range(8), strict=False)]
               for size in sizes}  # fmt: skip
    found = inference.benchmark(session.trainer, batches, steps)
    for figures in found:
        say(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in figures.items()))
    return {"inference": found}


def export(session) -> dict:
    """Write the model for other programs."""
    files = inference.export(session.trainer.model, session.args.output)
    for more in files[1:]:
        say(f"{files[0]} needs {more} beside it: it holds the weights")
    return {"output": str(files[0]), "files": [str(path) for path in files]}
