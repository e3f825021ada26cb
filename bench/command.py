"""Run this project's commands as a user would: a process each, its JSON taken from the last line of stdout."""

import json
import subprocess
import sys
from dataclasses import dataclass

from bench.machine import ROOT


class BenchError(RuntimeError):
    """A command that failed; its own words are on stderr already."""


@dataclass(frozen=True)
class Finished:
    """result: the command's JSON; seconds: wall-clock, start of the process included; peak_bytes: its memory."""

    result: dict
    seconds: float
    peak_bytes: int


MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([done.returncode, done.stdout.rstrip().rpartition("\\n")[2], seconds, peak], allow_nan=False))
"""


def run(*words: object) -> Finished:
    """Run `python WORDS...` in the project's root, showing the command line and its progress on stderr."""
    line = [str(word) for word in words]
    print(f"\n$ python {' '.join(line)}", file=sys.stderr, flush=True)
    # A small process in between, since the peak memory of children is known only as the largest of them all.
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *line], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if measured.returncode:
        raise BenchError(f"could not run: python {' '.join(line)}")
    status, last_line, seconds, peak = json.loads(measured.stdout)
    if status:
        raise BenchError(f"exit status {status} from: python {' '.join(line)}")
    return Finished(json.loads(last_line), seconds, peak)
