"""Run every public command once with each fault, and write the page that tells how it ended.

    python -m tests.failures --out docs/failures.md               all; as root, for full disks and file modes
    python -m tests.failures --only verify --only "model.sharding"

The last line of stdout is one JSON object. Exit status 1 where a command hung or showed a traceback.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tests.conftest import ROOT
from tests.failures.cases import FULL_BYTES, Case, all_cases, big, template

LIMIT = 240  # seconds a command may take
GUARD = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]
SHOWN = 400  # characters of a line
ENDS = re.compile(r"(rank \d+: |\S+: )?(error: |interrupted|terminated|SIG[A-Z]+ after)")
NOT_OURS = re.compile(r"[IWE]\d{4} \d\d:|Traceback|=====|-----")  # torchrun's
NOT_HERE = "not run: needs root"
PAGE = """# What happens when something is wrong

Every public command, run once with each fault: exit status and the words it ends with. Made by
`python -m tests.failures` on {date}, commit {commit}, on a CPU. Exit status 0 is a success, 1 an error, 2 flags that
cannot be, 130 Ctrl-C. Several ranks end by torchrun, which prints a report of its own and exits with 1. "W" is a folder
that holds day files, their data set `set`, a trained model `runs`, `model.json` and `plan.json`; "BIG" a larger one.
Unreadable files and folders are those whose mode (000) closes them; a full disk is a small file system of its own.
{count} runs, {bad} of them with a traceback or without an end.
"""


@dataclass(frozen=True)
class Ended:
    """status: exit status, None where it did not end in time; words: the lines it ended with; traceback: of ours."""

    case: Case
    status: int | None
    words: str
    traceback: bool

    @property
    def bad(self) -> bool:
        """Whether no user should see this."""
        return self.status is None or self.traceback or (self.status not in (0, 1, 2, 130))


def ours(text: str) -> bool:
    """Whether there is a traceback other than torchrun's own report of its ranks."""
    found = re.split(r"^.*Traceback \(most recent call last\):", text, flags=re.MULTILINE)[1:]
    return any("ChildFailedError" not in part and "torch/distributed/elastic" not in part for part in found)


def last_words(text: str, status: int | None) -> str:
    """What a user reads last: the error where there is one, otherwise the last line; progress bars go."""
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not re.search(r"\d+%\||it/s\]|rows/s\]|\?[a-z]*/s\]", line)]
    found = [number for number, line in enumerate(lines) if ENDS.match(line)]
    if not found or not status:
        return lines[-1] if lines else ""
    more = list(takewhile(lambda line: not NOT_OURS.match(line), lines[found[0] : found[0] + 3]))
    return " / ".join(more)


class Runner:
    """Runs cases in folders of its own below `home`."""

    def __init__(self, home: Path):
        self.home = home
        template(home / "template")
        big(home / "big")
        self._root = os.getuid() == 0 and shutil.which("setpriv") is not None

    def run(self, case: Case) -> Ended:
        """Prepare a case's folder, and run its command."""
        if (case.guarded or case.full) and not self._root:
            return Ended(case, 0, NOT_HERE, False)
        folder = Path(tempfile.mkdtemp(prefix="case_", dir=self.home))
        work = folder / "W"
        shutil.copytree(self.home / "template", work)
        mounted = case.full and self._mount(work / "full")
        try:
            if case.full and not mounted:
                return Ended(case, 0, "not run: no file system can be mounted here", False)
            command = [self._place(word, work) for word in case.words]
            if case.twice:
                self._start(command, Case("", "", ()))
            case.prepare(work)
            status, said = self._start(command, case)
            words = self._clean(last_words(said, status), work) if status else "done"
            return Ended(case, status, words, ours(said))
        finally:
            if mounted:
                subprocess.run(["umount", "-l", work / "full"], check=False)
            for path in [work, *work.rglob("*")]:
                if path.is_dir():
                    path.chmod(0o700)
            shutil.rmtree(folder, ignore_errors=True)

    def _mount(self, path: Path) -> bool:
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "tmpfs", path]
        return subprocess.run(words, capture_output=True).returncode == 0

    def _place(self, word: str, work: Path) -> str:
        return re.sub(r"^W(?=/)", str(work), re.sub(r"^BIG(?=/)", str(self.home / "big"), word))

    def _clean(self, text: str, work: Path) -> str:
        for path, name in ((work, "W"), (self.home / "big", "BIG"), (ROOT, "."), (Path(sys.executable).parent, "bin")):
            text = text.replace(str(path.resolve()), name).replace(str(path), name)
        text = re.sub(r"\.venv/bin/", "", text)
        text = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w+", "TMP", text)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."

    def _start(self, command: list[str], case: Case) -> tuple[int | None, str]:
        words = [*(GUARD if case.guarded else []), sys.executable, *command]
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        said, seen = bytearray(), threading.Event()

        def read() -> None:
            while piece := os.read(process.stderr.fileno(), 1 << 16):
                said.extend(piece)
                if case.ctrl_c and case.ctrl_c.encode() in said:
                    seen.set()

        reader = threading.Thread(target=read)
        reader.start()
        stop = time.monotonic() + LIMIT
        sent = False
        while process.poll() is None and time.monotonic() < stop:
            if seen.wait(0.05) and case.ctrl_c and not sent:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
                sent = True
            time.sleep(0.02)
        status = process.poll()
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join()
        process.stderr.close()
        return status, said.decode(errors="replace")


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def page(ends: list[Ended], of: str) -> str:
    """The page, a table a command."""
    head = PAGE.format(
        date=time.strftime("%Y-%m-%d", time.gmtime()), commit=of, count=len(ends),
        bad=sum(end.bad for end in ends),
    )  # fmt: skip
    lines = [head]
    for command in dict.fromkeys(end.case.command for end in ends):
        lines += [f"## {command}\n", "| fault | exit | words |", "|---|---|---|"]
        for end in ends:
            if end.case.command == command:
                status = "none" if end.status is None else end.status
                words = end.words.replace("|", "\\|").replace("<", "&lt;")
                mark = " **traceback**" * end.traceback
                lines.append(f"| {end.case.fault} | {status}{mark} | {words} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: none)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases of commands that begin so")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="commands at a time (default: 2)")
    args = parser.parse_args(argv)
    cases = [case for case in all_cases() if not args.only or any(case.command.startswith(o) for o in args.only)]
    of = commit()
    with tempfile.TemporaryDirectory(prefix="failures_") as home, ThreadPoolExecutor(args.at_once) as pool:
        runner = Runner(Path(home))
        ends = []
        for end in pool.map(runner.run, cases):
            ends.append(end)
            mark = "BAD " if end.bad else ""
            print(f"{mark}{end.case.command}; {end.case.fault}: {end.status}: {end.words}", file=sys.stderr, flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(ends, of))
    bad = [f"{end.case.command}: {end.case.fault}" for end in ends if end.bad]
    print(json.dumps({"runs": len(ends), "bad": bad}))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
