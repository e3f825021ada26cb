"""What a measurement ran on."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


def describe() -> dict:
    """Hardware, date and commit, to stand beside every number."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def caption(machine: dict, device: str) -> str:
    """The same of a run on `device`, "cuda" or "cpu", as a line for a plot."""
    of = machine["gpu"] if device == "cuda" else f"{machine['cores']} cores of {machine['processor']}"
    return f"{of}; torch {machine['torch']}, {machine['date']}, {machine['commit']}"
