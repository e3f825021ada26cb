"""Runs fuzz cases one after the other, and tells of each on stdout: one JSON object a line, before and after."""

import contextlib
import io
import json
import random
import re
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path

from tests.fuzz.case import Case, WrongError, template
from tests.fuzz.kinds import KINDS


def _run(main, words: list[str]) -> tuple[int, str]:
    """Run a command. Raises WrongError where it does not end as commands do."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as ended:
            status = ended.code
    said = err.getvalue().replace("\r", "\n")  # a progress bar goes by it
    if status not in (0, 1, 2):
        raise WrongError(f"exit status {status}: {said[-300:]}")
    if "Traceback (most recent call last)" in said or re.search(r"error: *:|error: *$", said, re.MULTILINE):
        raise WrongError(f"words that are none: {said[-600:]}")
    if status and len(re.findall(r"^(?:\S+: )?error: ", said, re.MULTILINE)) != 1:
        raise WrongError(f"exit status {status}, and not one error: {said[-300:]}")
    if status == 0:
        json.loads(out.getvalue().splitlines()[-1], parse_constant=_no_number)
    return status, said


def _no_number(name: str):
    raise WrongError(f"{name} in the result")


def _peak(reset: bool = False) -> int:
    """Most bytes of memory since the last reset."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(home: Path, kind: str, seed: int, most_bytes: int) -> dict:
    """Run a case; what came of it. A fault has "fault", the words."""
    folder = home / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / "template", folder)
    _peak(reset=True)
    ends = []

    def run(main, words):
        found = _run(main, words)
        ends.append(found[0])
        return found

    result = {"kind": kind, "seed": seed}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](Case(folder, random.Random(f"{kind} {seed}"), run))
    except WrongError as wrong:
        result["fault"] = str(wrong)
    except Exception as error:
        result["fault"] = "".join(traceback.format_exception(error)[-4:])[-1500:]
    result |= {"statuses": ends, "peak": _peak()}
    if result["peak"] > most_bytes:
        result.setdefault("fault", f"took {result['peak'] / 1e6:,.0f} MB")
    return result


def main() -> None:
    """home, the limit of memory, and the cases "kind seed", from the command line and stdin."""
    home, most_bytes = Path(sys.argv[1]), int(sys.argv[2])
    tell = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - stdout stays this process's alone
    sys.stdout = sys.stderr
    if not (home / "template").exists():
        with contextlib.redirect_stderr(io.StringIO()):
            template(home / "new")
        (home / "new").rename(home / "template")
    print("ready", file=tell)
    for line in sys.stdin:
        kind, seed = line.split()
        print(json.dumps(one(home, kind, int(seed), most_bytes)), file=tell)


if __name__ == "__main__":
    main()
