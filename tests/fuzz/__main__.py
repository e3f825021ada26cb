"""Fuzz what comes from outside: no traceback, no hang, no limit reached, no difference to the reference.

    python -m tests.fuzz --minutes 10 --seed 0
    python -m tests.fuzz --kind parquet --seed 17 --cases 1      one case again

Cases run in a child process that is watched: it is killed where a case takes more memory or time than the limits, and
another goes on. The last line of stdout is one JSON object. Exit status 1 where there was a fault.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT
from tests.fuzz.kinds import KINDS

MOST_BYTES = 2 << 30  # of a process, torch and compiled code included: about 0.7 GB
MOST_SECONDS = 60  # of a case
CASES_A_CHILD = 300
START_SECONDS = 300  # compilers may have to run first


class Child:
    """The process that runs cases."""

    def __init__(self, home: Path):
        words = [sys.executable, "-m", "tests.fuzz.child", str(home), str(MOST_BYTES)]
        self._process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self._lines: queue.Queue = queue.Queue()
        self._said: list[str] = []
        for target in (self._read, self._listen):
            threading.Thread(target=target, daemon=True).start()
        if self._wait(START_SECONDS) != "ready\n":
            raise RuntimeError(f"the child did not start: {''.join(self._said)[-2000:]}")

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _listen(self) -> None:
        for line in self._process.stderr:
            self._said.append(line)
            del self._said[:-50]

    def _memory(self) -> int:
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * 4096
        except (OSError, IndexError):
            return 0

    def _wait(self, seconds: float) -> str:
        """The next line; "" where the process ended, "slow" and "large" where it reached a limit."""
        stop = time.monotonic() + seconds
        while True:
            try:
                return self._lines.get(timeout=0.02)
            except queue.Empty:
                if self._memory() > MOST_BYTES:
                    return "large"
                if time.monotonic() > stop:
                    return "slow"

    def run(self, kind: str, seed: int) -> tuple[dict, bool]:
        """What came of a case, and whether this child can run another."""
        self._process.stdin.write(f"{kind} {seed}\n")
        line = self._wait(MOST_SECONDS)
        if line.startswith("{"):
            return json.loads(line), True
        self.close()
        ended = f"the process ended with {self._process.returncode}: {''.join(self._said)[-600:]}"
        limits = {"slow": f"no end after {MOST_SECONDS} s", "large": f"took more than {MOST_BYTES / 1e6:,.0f} MB"}
        words = limits.get(line, ended)
        return {"kind": kind, "seed": seed, "fault": words, "statuses": []}, False

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def cases(kinds: list[str], seed: int, count: int | None) -> Iterator[tuple[str, int]]:
    """Kinds in turns, with seeds from `seed` on."""
    turn = 0
    while count is None or turn < count:
        yield kinds[turn % len(kinds)], seed + turn // len(kinds)
        turn += 1


def fuzz(kinds: list[str], seed: int, seconds: float, count: int | None) -> dict:
    """Run cases for so long, or so many; how many of each kind ended how, and the faults."""
    ends: dict[str, Counter] = {kind: Counter() for kind in kinds}
    faults, peak, start = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as home:
        child, left = None, 0
        try:
            for kind, number in cases(kinds, seed, count):
                if time.monotonic() - start > seconds:
                    break
                if not left:
                    if child:
                        child.close()
                    child, left = Child(Path(home)), CASES_A_CHILD
                    if not sum(map(Counter.total, ends.values())):
                        start = time.monotonic()
                found, alive = child.run(kind, number)
                left = (left - 1) * alive
                peak = max(peak, found.get("peak", 0))
                ended = "fault" if "fault" in found else "error" if any(found["statuses"]) else "right"
                ends[kind][ended] += 1
                if "fault" in found:
                    faults.append({key: found[key] for key in ("kind", "seed", "fault")})
                    print(f"FAULT {kind} {number}: {found['fault']}\n", file=sys.stderr, flush=True)
        finally:
            if child:
                child.close()
    return {
        "seconds": round(time.monotonic() - start), "peak_bytes": peak,
        "cases": {kind: dict(counted) for kind, counted in ends.items()}, "faults": faults,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="at most (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first one (default: 0)")
    parser.add_argument("--cases", type=int, metavar="N", help="so many, instead of as many as there is time for")
    parser.add_argument("--kind", action="append", default=[], choices=KINDS, help="these kinds only")
    args = parser.parse_args(argv)
    found = fuzz(args.kind or list(KINDS), args.seed, 60 * args.minutes, args.cases)
    for kind, counted in found["cases"].items():
        print(f"{kind:14}", ", ".join(f"{n} {end}" for end, n in sorted(counted.items())), file=sys.stderr)
    print(json.dumps(found))
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
