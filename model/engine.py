"""The one training step, evaluation, and the loop around them."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.config import ConfigError
from model.dlrm import DLRM
from model.metrics import Metrics, measure
from model.optimizers import Optimizer
from model.schedule import Schedule

TESTS_PER_EPOCH = 20


@dataclass(frozen=True)
class Precision:
    """autocast: the type of matrix products, None for float32 throughout; loss_scale: static, for float16's range."""

    autocast: torch.dtype | None = None
    loss_scale: float = 1.0

    def __str__(self) -> str:
        return str(self.autocast or torch.float32).removeprefix("torch.")


class Trainer:
    """A model in training: the step, and the number of steps done.

    A batch is (dense float32 [B, 13], sparse int32 [B, 26], label float32 [B]) on the model's device.
    """

    def __init__(
        self, model: DLRM, schedule: Schedule, precision: Precision = Precision(), optimizer: Optimizer = Optimizer()  # noqa: B008
    ):
        self.model, self.schedule, self.precision = model, schedule, precision
        self.device = model.embedding.weight.device
        self.optimizer = optimizer.for_mlps(model.dense_parameters())
        self.steps = 0

    def _logits(self, batch) -> torch.Tensor:
        autocast = self.precision.autocast
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            return self.model(batch.dense, batch.sparse)

    def step(self, batch) -> torch.Tensor:
        """Train on one batch; returns its mean loss, a scalar tensor on the device."""
        self.steps += 1
        lr, scale, embedding = self.schedule.at(self.steps), self.precision.loss_scale, self.model.embedding
        self.optimizer.param_groups[0]["lr"] = lr
        embedding.lr.fill_(lr)
        embedding.step, embedding.loss_scale = self.steps, scale
        loss = F.binary_cross_entropy_with_logits(self._logits(batch), batch.label)
        (loss * scale).backward()
        if scale != 1.0:
            torch._foreach_div_([parameter.grad for parameter in self.model.dense_parameters()], scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batches: Iterable, total: int, name: str) -> Metrics:
        """Exact metrics over `total` batches. Memory: 8 B a row."""
        bar = tqdm(batches, total=total, desc=name, unit="batch", file=sys.stderr, leave=False)
        scored = [(self._logits(batch), batch.label) for batch in bar]
        return measure(torch.cat([s for s, _ in scored]), torch.cat([label for _, label in scored]))


@dataclass(frozen=True)
class LoopOptions:
    """epochs: passes over the data in all, those before a resume included. print_freq, test_freq: in steps, 0 for 20
    tests an epoch. test_after: no test before so many epochs. auc_threshold: stop once a test reaches it."""

    epochs: int = 1
    print_freq: int = 0
    test_freq: int = 0
    test_after: float = 0.0
    auc_threshold: float = 1.0

    def frequencies(self, steps_per_epoch: int) -> tuple[int, int]:
        """(print_freq, test_freq) in steps, at least 1."""
        test = self.test_freq or max(1, steps_per_epoch // TESTS_PER_EPOCH)
        return self.print_freq or max(1, min(1000, steps_per_epoch // TESTS_PER_EPOCH)), test


@dataclass
class Progress:
    """What the loop did: samples and seconds of training (tests left out), tests as (step, Metrics), why it ended."""

    samples: int = 0
    seconds: float = 0.0
    tests: list[tuple[int, Metrics]] = field(default_factory=list)
    ended: str = "all epochs done"

    @property
    def samples_per_second(self) -> float:
        """Training speed; 0 where nothing was trained."""
        return self.samples / self.seconds if self.seconds else 0.0


def fit(trainer: Trainer, loader, test: Callable[[], Metrics], options: LoopOptions) -> Progress:
    """Train from trainer.steps on to the end of the last epoch, or until a test reaches the AUC threshold.

    loader: len() batches an epoch and batches(epoch, start), as in gpu_etl.load. Raises ConfigError on a loss that is
    no number.
    """
    progress = Progress()
    per_epoch = len(loader)
    total = per_epoch * options.epochs
    print_freq, test_freq = options.frequencies(per_epoch)
    with tqdm(total=total, initial=trainer.steps, desc="train", unit="step", file=sys.stderr) as bar:
        while trainer.steps < total:
            epoch, start = divmod(trainer.steps, per_epoch)
            mark = time.perf_counter()
            for batch in loader.batches(epoch, start):
                loss = trainer.step(batch)
                progress.samples += len(batch.label)
                bar.update()
                if trainer.steps % print_freq == 0:
                    _report(bar, trainer, loss.item())
                if trainer.steps % test_freq == 0 and trainer.steps < total:
                    if trainer.steps / per_epoch < options.test_after:
                        continue
                    progress.seconds += time.perf_counter() - mark
                    if _test(trainer, test, progress, bar) >= options.auc_threshold:
                        progress.ended = f"AUC {options.auc_threshold} reached at step {trainer.steps}"
                        return progress
                    mark = time.perf_counter()
            progress.seconds += time.perf_counter() - mark
    return progress


def _test(trainer: Trainer, test: Callable[[], Metrics], progress: Progress, bar: tqdm) -> float:
    found = test()
    progress.tests.append((trainer.steps, found))
    bar.write(f"step {trainer.steps}: AUC {found.auc:.5f}, log loss {found.log_loss:.5f}", file=sys.stderr)
    return found.auc


def _report(bar: tqdm, trainer: Trainer, loss: float) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise ConfigError(f"step {trainer.steps}: the loss is {loss}; lower --lr, or raise --warmup_steps")
    bar.set_postfix_str(f"loss {loss:.4f}, lr {trainer.schedule.at(trainer.steps):.4g}", refresh=False)


def profile(trainer: Trainer, loader, steps: int, folder: Path) -> str:
    """Train `steps` steps under torch's profiler; writes the trace into the folder, returns the table of costs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for batch, _ in zip(loader.batches(), range(steps), strict=False):
            trainer.step(batch)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return profiler.key_averages().table(sort_by=f"self_{trainer.device.type}_time_total", row_limit=20)
