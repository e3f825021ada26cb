"""When to write checkpoints, which to keep, and what to do when the run is asked to stop."""

import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model import checkpoint
from model.metrics import Metrics

BEST = "best"


@dataclass(frozen=True)
class KeepOptions:
    """folder: of the run; every_steps, every_minutes: between checkpoints, 0 for none; last: how many of them stay;
    best: keep the one with the best validation AUC as well, under that name; at_end: write one at the end."""

    folder: Path
    every_steps: int = 0
    every_minutes: float = 0.0
    last: int = 3
    best: bool = False
    at_end: bool = False


class Keeper:
    """Writes a trainer's checkpoints. state: what they hold beside the trainer's own."""

    def __init__(self, options: KeepOptions, trainer, state: dict, best_auc: float = 0.0):
        self._options, self._trainer, self._state = options, trainer, state
        self._mark = time.monotonic()
        self.best_auc, self.latest = best_auc, None
        self.signal: signal.Signals | None = None

    def _save(self, name: str) -> Path:
        path = self._options.folder / name
        checkpoint.save(path, self._trainer, {**self._state, "best_auc": self.best_auc})
        self._mark = time.monotonic()
        return path

    def save(self) -> Path:
        """Write a checkpoint now, unless the latest one is of this step; drop those too old to keep."""
        name = f"step_{self._trainer.steps}"
        if self.latest is None or self.latest.name != name:
            self.latest = self._save(name)
            for _, path in checkpoint.steps_in(self._options.folder)[: -self._options.last]:
                checkpoint.remove(path)
        return self.latest

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be written after this step."""
        steps, minutes = self._options.every_steps, self._options.every_minutes
        late = minutes and time.monotonic() - self._mark >= 60 * minutes
        return bool((steps and self._trainer.steps % steps == 0) or late)

    def tested(self, found: Metrics) -> None:
        """Take note of a validation result; the best one's checkpoint is kept, if asked for."""
        if found.auc > self.best_auc:
            self.best_auc = found.auc
            if self._options.best:
                self._save(BEST)

    def end(self) -> None:
        """Write the last checkpoint, if asked for."""
        if self._options.at_end or self._options.every_steps or self._options.every_minutes:
            self.save()

    @contextmanager
    def watch_signals(self):
        """While this lasts, SIGTERM and the first Ctrl-C only set `signal`; a second Ctrl-C interrupts at once."""

        def note(number, _):
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
