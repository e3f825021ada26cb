"""Runs a command in a process of its own with a time limit."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Ended:
    """status: exit status, negative for a signal, None where the time was up; seconds: wall-clock."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float

    def words(self) -> str:
        """Why it ended as it did, in a line: what it said last, the signal that killed it, or the time limit."""
        if self.status is None:
            return f"did not end within {self.seconds:.0f} s; stopped"
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"killed by {name}" + (f" after: {self._last()}" if self._last() else "")
        return self._last() or f"exit status {self.status} without a word"

    def _last(self) -> str:
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


def stop_all() -> None:
    """Stop all that run() has started and waits for in other threads, with what they started."""
    for process in list(_running):
        os.killpg(process.pid, signal.SIGKILL)


def run(words: list[str], seconds: float, **environment: str) -> Ended:
    """Run `python WORDS...` in the project's root; what it started is stopped with it when the time is up."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"TQDM_DISABLE": "1", **environment}, text=True,
        errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        stdout, stderr = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        status = None
    finally:
        _running.discard(process)
    return Ended(status, stdout, stderr, time.perf_counter() - start)
