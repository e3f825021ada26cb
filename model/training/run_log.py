"""What a training run leaves to read: JSON lines, TensorBoard events, MLPerf's log, a plot."""

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path

from common.jsonable import jsonable
from model.config import ConfigError
from model.metrics import Metrics
from model.training.mlperf_log import MLPerfLog

LINES, CURVES = "metrics.jsonl", "curves.png"
EVENTS = ("train", "val", "test")


class RunLog:
    """Takes what happens. folder: gets metrics.jsonl (appended, so a resumed run goes on in it), TensorBoard's events
    and, with close(), curves.png; None: nothing is written there. A folder with the lines of another run than `run`
    keeps them to itself: run_ID within it is taken. mlperf: the log that MLPerf's checker reads. folder: as it is
    then."""

    def __init__(self, folder: Path | None = None, mlperf: MLPerfLog | None = None, run: str = ""):
        self._mlperf, self._run = mlperf, run
        self._lines = self._board = None
        if folder is not None:
            for package in ("tensorboard", "matplotlib"):  # before the training, not after it
                if importlib.util.find_spec(package) is None:
                    raise ConfigError(f"--log_dir: the package {package} is missing: pip install {package}")
            from torch.utils.tensorboard import SummaryWriter  # half a second that other runs need not wait for

            if any(event.get("run") != run for event in read_lines(folder / LINES)):
                folder = folder / f"run_{run}"
            folder.mkdir(parents=True, exist_ok=True)
            torn = (folder / LINES).exists() and (folder / LINES).read_bytes()[-1:] not in (b"", b"\n")
            self._lines = open(folder / LINES, "a", buffering=1)  # noqa: SIM115 - closed in close()
            self._lines.write("\n" * torn)
            self._board = SummaryWriter(folder)
            self._board.add_text("run", run)
        self.folder = folder

    def _write(self, event: str, step: int, **values) -> None:
        if self._lines:
            line = {"event": event, "step": step, "time": round(time.time(), 3), "run": self._run, **values}
            self._lines.write(json.dumps(jsonable(line), allow_nan=False) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{event}/{name}", value, step)

    def epoch(self, what: str, epoch: int) -> None:
        """An epoch (from 0) begins ("start") or ends ("stop")."""
        if self._mlperf:
            self._mlperf.event(f"epoch_{what}", epoch_num=epoch + 1)

    def trained(self, step: int, loss: float, lr: float, progress) -> None:
        """The loss and learning rate of a step, and what a loop.Progress says of the speed so far."""
        self._write("train", step, loss=loss, lr=lr, samples_per_second=round(progress.samples_per_second))

    def test_start(self, epochs: float) -> None:
        """A test begins, after so many epochs."""
        if self._mlperf:
            self._mlperf.event("eval_start", epoch_num=epochs)

    def tested(self, step: int, epochs: float, found: Metrics, split: str = "val") -> None:
        """A test's result."""
        self._write(split, step, **asdict(found))
        if self._mlperf and split == "val":
            self._mlperf.event("eval_accuracy", jsonable(found.auc), epoch_num=epochs)
            self._mlperf.event("eval_stop", epoch_num=epochs)

    def close(self) -> None:
        """Draw the curves and close the files."""
        if self._lines:
            self._lines.close()
            self._board.close()
            draw_curves(self.folder, self._run)


def summary(result: dict, found: Metrics) -> str:
    """The table that ends a run: how far, how fast, where the time went, how well. result: train.py's."""
    shares = "  ".join(f"{name} {100 * share:.1f} %" for name, share in result["time_shares"].items())
    tests = result["validation"]
    best = max(tests, key=lambda test: test["auc"]) if tests else None
    lines = [
        "",
        f"steps       {result['steps']:,}; {result['ended']}",
        f"speed       {result['samples_per_second']:,} samples/s over {result['train_seconds']:.1f} s of training",
        f"time        {shares}",
        f"validation  best AUC {best['auc']:.5f} at step {best['step']:,}" if best else "validation  none",
        f"test        AUC {found.auc:.5f}  log loss {found.log_loss:.5f}  normalised entropy "
        f"{found.normalized_entropy:.5f}  calibration {found.calibration:.4f}  rows {found.rows:,}",
        f"checkpoint  {result['checkpoint'] or 'none'}",
    ]
    return "\n".join(lines)


def read_lines(path: Path) -> list[dict]:
    """The events of a metrics.jsonl, in order; none where there is no such file. Lines that are no events, such as one
    that was torn by a kill, are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and event.get("event") in EVENTS and isinstance(event.get("step"), int):
            found.append(event)
    return found


def draw_curves(folder: Path, run: str) -> None:
    """Draw a run's lines of the folder's metrics.jsonl as curves.png: loss and learning rate, AUC, over steps. Of a
    step that was run twice, before and after a resume, the last line counts. The picture holds the run's id."""
    from matplotlib.figure import Figure

    events: dict[str, dict[int, dict]] = {kind: {} for kind in EVENTS}
    for event in read_lines(folder / LINES):
        if event.get("run") != run:
            continue
        events[event["event"]][event["step"]] = event

    def curve(kind: str, key: str) -> tuple[list[int], list[float]]:
        of = events[kind]
        steps = [step for step in sorted(of) if isinstance(of[step].get(key), int | float)]
        return steps, [of[step][key] for step in steps]

    figure = Figure(figsize=(10, 8), dpi=100, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(*curve("train", "loss"), lw=1, label="training loss of one batch")
    rate = top.twinx()
    rate.plot(*curve("train", "lr"), "C3--", lw=1, label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    for kind, mark in (("val", "o-"), ("test", "s")):
        top.plot(*curve(kind, "log_loss"), mark, ms=4, label=f"log loss on {kind}")
        bottom.plot(*curve(kind, "auc"), mark, ms=4, label=f"AUC on {kind}")
    top.set(ylabel="log loss [nats]")
    bottom.set(xlabel="step", ylabel="AUC")
    handles = [axes.get_legend_handles_labels() for axes in (top, rate)]
    top.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1])
    bottom.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    part = folder / f"{CURVES}.part"
    figure.savefig(part, format="png", metadata={"run": run})
    part.replace(folder / CURVES)
