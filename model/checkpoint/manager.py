"""When to write checkpoints, which to keep, and what to do when the run is asked to stop."""

import math
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from common import atomic
from model.checkpoint import files as checkpoint
from model.checkpoint.runs import BEST
from model.checkpoint.state import CheckpointError, read_state
from model.metrics import Metrics


@dataclass(frozen=True)
class CheckpointOptions:
    """folder: of the run; every_steps, every_minutes: between checkpoints, 0 for none; last: how many of them stay;
    best: keep the one with the best validation AUC as well, under that name; at_end: write one at the end; behind:
    write them while training goes on, from a copy in host memory."""

    folder: Path
    every_steps: int = 0
    every_minutes: float = 0.0
    last: int = 3
    best: bool = False
    at_end: bool = False
    behind: bool = False


class CheckpointManager:
    """Writes a trainer's checkpoints; latest: the last one complete. state: what they hold beside the trainer's own,
    the best AUC in it. source: the checkpoint that the run goes on from. claim: makes the folder to write into the
    run's own, before the first checkpoint, and returns it (runs.Claim); None: options.folder is. ranks: all that write
    them together. Deletes only checkpoints of its own run that are older than what it has just written."""

    def __init__(
        self, options: CheckpointOptions, trainer, state: dict, source: Path | None = None,
        claim: Callable[[], Path] | None = None, ranks=None,
    ):  # fmt: skip
        self._options, self._trainer, self._state, self._ranks = options, trainer, state, ranks
        self._source, self._claim = source, claim
        self._writer, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        self._named: str | None = None
        self._mark = time.monotonic()
        self.best_auc, self.latest = state.get("best_auc", 0.0), None
        self._noted: signal.Signals | None = None
        self._told = False

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that asked to stop."""
        return self._noted

    def _save(self, name: str) -> None:
        self.wait()
        if self._claim:
            self._options, self._claim = replace(self._options, folder=self._claim()), None
        path, behind, state = self._options.folder / name, self._options.behind, {"best_auc": self.best_auc}
        what = checkpoint.content(self._trainer, {**self._state, **state}, self._ranks, behind)
        self._mark = time.monotonic()
        if behind:
            self._writing = self._writer.submit(self._write, path, what)
        else:
            self._write(path, what)

    def _write(self, path: Path, what: checkpoint.Content) -> None:
        checkpoint.write(path, what, self._ranks)
        if path.name != BEST:
            self.latest = path
            if self._ranks is None or self._ranks.rank == 0:
                self._drop_older(path, what.state.steps)

    def _drop_older(self, written: Path, steps: int) -> None:
        """Delete this run's checkpoints that are older than what is kept, and not what the run goes on from."""
        older = [path for number, path in checkpoint.steps_in(written.parent) if number < steps]
        for path in older[: max(0, len(older) - (self._options.last - 1))]:
            if (self._source is None or not path.samefile(self._source)) and self._is_mine(path):
                atomic.remove(path)

    def _is_mine(self, path: Path) -> bool:
        try:
            return read_state(path).run.get("run") == self._state.get("run")
        except CheckpointError:
            return False

    def wait(self) -> None:
        """Until what is being written is there. Raises OSError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def save(self) -> None:
        """Write a checkpoint now, unless the latest one is of this step; drop those too old to keep."""
        name = f"step_{self._trainer.steps}"
        if self._named != name:
            self._save(name)
            self._named = name

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self._in_step or self._late

    @property
    def _in_step(self) -> bool:
        return bool(self._options.every_steps and self._trainer.steps % self._options.every_steps == 0)

    @property
    def _late(self) -> bool:
        minutes = self._options.every_minutes
        return bool(minutes and time.monotonic() - self._mark >= 60 * minutes)

    def tested(self, found: Metrics) -> None:
        """Take note of a validation result; the best one's checkpoint is kept, if asked for."""
        if math.isnan(found.auc) and self._options.best and not self._told:
            print(
                "warning: the validation split has rows of one class only, so its AUC is undefined: --save_best has "
                "nothing to go by", file=sys.stderr,
            )  # fmt: skip
            self._told = True
        if found.auc > self.best_auc:
            self.best_auc = found.auc
            if self._options.best:
                self._save(BEST)

    def end(self) -> None:
        """Write the last checkpoint, if asked for or told to stop by a signal, and wait until all are there."""
        if self.signal or self._options.at_end or self._options.every_steps or self._options.every_minutes:
            self.save()
        self.wait()

    @contextmanager
    def watch_signals(self):
        """While this lasts, SIGTERM and the first Ctrl-C are only noted; a second Ctrl-C interrupts at once."""

        def note(number, _):
            if self._noted is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._noted = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
