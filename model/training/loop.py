"""The loop around the training step: epochs, tests, reports, checkpoints."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

import torch
from tqdm import tqdm

from model.checkpoint.manager import CheckpointManager
from model.config import ConfigError
from model.metrics import Metrics
from model.training.loss_scale import MOST_SKIPPED
from model.training.run_log import RunLog
from model.training.trainer import Trainer

TESTS_PER_EPOCH = 20


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
    """What the loop did: samples and seconds of training (tests and checkpoints left out), tests as (step, Metrics),
    why it ended; reached: whether that was the AUC threshold; signal: the one that ended it, if one did."""

    samples: int = 0
    seconds: float = 0.0
    tests: list[tuple[int, Metrics]] = field(default_factory=list)
    ended: str = "all epochs done"
    reached: bool = False
    signal: Signals | None = None

    @property
    def samples_per_second(self) -> float:
        """Training speed; 0 where nothing was trained."""
        return self.samples / self.seconds if self.seconds else 0.0


class Loop:
    """Trains a Trainer from its step on to the end of the last epoch, to the AUC threshold, or to a signal.

    loader: len() batches an epoch and batches(epoch, start), as in gpu_etl.load. test: () -> Metrics on the validation
    split. keeper: writes checkpoints, None for none. log: takes what happens (run_log.RunLog).
    """

    def __init__(
        self, trainer: Trainer, loader, test: Callable[[], Metrics], options: LoopOptions,
        keeper: CheckpointManager | None = None, log: RunLog | None = None,
    ):  # fmt: skip
        self.trainer, self.loader, self.test, self.options = trainer, loader, test, options
        self.keeper, self.log = keeper, log or RunLog()
        self.progress = Progress()
        self._print_freq, self._test_freq = options.frequencies(len(loader))
        self._losses: list[torch.Tensor] = []

    def run(self) -> Progress:
        """Raises ConfigError on a loss that is no number: no checkpoint is written from the step with it on."""
        trainer, per_epoch = self.trainer, len(self.loader)
        total, begun = per_epoch * self.options.epochs, trainer.steps
        watching = self.keeper.watch_signals() if self.keeper else nullcontext()
        with watching, tqdm(total=total, initial=trainer.steps, desc="train", unit="step", file=sys.stderr) as bar:
            while trainer.steps < total and not self._stopped:
                epoch, start = divmod(trainer.steps, per_epoch)
                self.log.epoch("start", epoch)
                self._run_epoch(epoch, start, total, bar)
                self.log.epoch("stop", epoch)
            self._check()
            if self.trainer.loss_scale and self.progress.signal is None:
                self.trainer.loss_scale.check(trainer.steps - begun)
            if self.keeper:
                self.keeper.end()
        return self.progress

    @property
    def _stopped(self) -> bool:
        return self.progress.reached or self.progress.signal is not None

    def _run_epoch(self, epoch: int, start: int, total: int, bar: tqdm) -> None:
        batches = iter(self.loader.batches(epoch, start))
        mark = time.perf_counter()
        while not self._stopped:
            with self.trainer.clock.part("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                break
            self._losses.append(self.trainer.step(batch))
            self.progress.samples += self.trainer.rows(batch)
            bar.update()
            pause = self._due(total)
            if pause:
                self._check()
                self.progress.seconds += time.perf_counter() - mark
                for action in pause:
                    action(bar)
                mark = time.perf_counter()
        self.progress.seconds += time.perf_counter() - mark

    def _due(self, total: int) -> list[Callable[[tqdm], None]]:
        """What is to be done after this step, in order."""
        steps, found = self.trainer.steps, []
        if steps % self._print_freq == 0:
            found.append(self._report)
        if steps % self._test_freq == 0 and total > steps >= self.options.test_after * len(self.loader):
            found.append(self._test)
        if self.keeper and self.keeper.due:
            found.append(lambda _: self.keeper.save())
        if self.keeper and self.keeper.signal:
            found.append(self._end_by_signal)
        return found

    def _end_by_signal(self, _: tqdm) -> None:
        self.progress.signal = self.keeper.signal
        self.progress.ended = f"{self.keeper.signal.name} after step {self.trainer.steps}"

    def _test(self, bar: tqdm) -> None:
        place = self.trainer.steps / len(self.loader)
        self.log.test_start(place)
        found = self.test()
        self.progress.tests.append((self.trainer.steps, found))
        self.log.tested(self.trainer.steps, place, found)
        bar.write(
            f"step {self.trainer.steps}: AUC {found.auc:.5f}, log loss {found.log_loss:.5f}, calibration "
            f"{found.calibration:.3f}", file=sys.stderr,
        )  # fmt: skip
        if self.keeper:
            self.keeper.tested(found)
        if found.auc >= self.options.auc_threshold:
            self.progress.reached = True
            self.progress.ended = f"AUC {self.options.auc_threshold} reached at step {self.trainer.steps}"

    def _report(self, bar: tqdm) -> None:
        loss, lr = self._last_loss, self.trainer.schedule.at(self.trainer.steps)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.4g}", refresh=False)
        self.log.trained(self.trainer.steps, loss, lr, self.progress)

    def _check(self) -> None:
        """Look at what may have gone wrong since the last time, all at once: each look waits for the device."""
        if hasattr(self.loader, "check"):
            self.loader.check()
        self._check_losses()
        if self.trainer.loss_scale:
            self.trainer.loss_scale.check(MOST_SKIPPED)

    def _check_losses(self) -> None:
        """Raise ConfigError where a loss since the last time is no number."""
        if not self._losses:
            return
        losses = self.trainer.whole_losses(torch.stack(self._losses)).cpu()
        self._losses = []
        self._last_loss = losses[-1].item()
        bad = (~losses.isfinite()).nonzero()
        if not len(bad):
            return
        step = self.trainer.steps - len(losses) + 1 + int(bad[0])
        epoch, number = divmod(step - 1, len(self.loader))
        rows = ""
        if hasattr(self.loader, "ranges"):
            begin, end = self.loader.ranges(epoch, number)[0]
            rows = f", rows {begin + 1} to {end} of the training split"
        saved = self.keeper and self.keeper.latest
        raise ConfigError(
            f"step {step} (epoch {epoch + 1}, batch {number + 1}{rows}): the loss is {losses[bad[0]].item()}; "
            f"lower --lr, or raise --warmup_steps. Last good checkpoint: {saved or 'none'}"
        )


def fit(trainer: Trainer, loader, test: Callable[[], Metrics], options: LoopOptions, *more) -> Progress:
    """Loop(...).run()."""
    return Loop(trainer, loader, test, options, *more).run()


def profile(trainer: Trainer, loader, steps: int, folder: Path) -> str:
    """Train `steps` steps under torch's profiler; writes the trace into the folder, returns the table of costs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # those of the fused CPU step too
    with torch.profiler.profile(activities=activities, experimental_config=threads) as profiler:
        for batch, _ in zip(loader.batches(), range(steps), strict=False):
            trainer.step(batch)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return profiler.key_averages().table(sort_by=f"self_{trainer.device.type}_time_total", row_limit=20)
