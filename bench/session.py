"""Runs the stages of bench/gpu_session.sh: see there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import machine
from bench.machine import ROOT
from bench.session_steps import STAGES, Session, Step

STAGE_SECONDS = 460  # of a stage; what does not fit is left for the next call
LEAST = 10  # seconds: less is not worth a start
TAIL = 15  # lines of a log that are shown of a step that failed


def session() -> Session:
    """What the environment asks for."""
    look, device = os.environ.get, os.environ.get("DEVICE", "cuda")
    rows = int(look("ROWS", 8_000_000))
    data = Path(look("DATA", f"/tmp/gpu_session_{rows}"))
    out = Path(look("OUT", "gpu_results")).resolve()
    return Session(device, rows, float(look("SECONDS_EACH", 5)), data, out, int(look("GPUS", 1)))


def read(path: Path) -> dict | None:
    """A step's result; None where there is none, or it is cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "result" in found else None


def _last_line(path: Path) -> object:
    """What a command printed last: its JSON, or its words."""
    lines = path.read_text().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return lines[-1]


def _wait(process: subprocess.Popen, seconds: float) -> str | None:
    """Why a process did not end well within so many seconds; it is stopped then, and all that it started."""
    try:
        status = process.wait(seconds)
        return None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(step: Step, folder: Path, seconds: float) -> str | None:
    """Do a step: its JSON to NAME.json, its stderr to NAME.log. Returns why it failed; NAME.json is there only where it
    did not."""
    result, printed, log = (folder / f"{step.name}.{kind}" for kind in ("json", "out", "log"))
    result.unlink(missing_ok=True)
    line = [sys.executable, *map(str, step.words)]
    print(f"== {step.name}: python {' '.join(line[1:])}", flush=True)
    start = time.perf_counter()
    with open(printed, "w") as stdout, open(log, "w") as stderr:
        process = subprocess.Popen(
            line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        failed = _wait(process, seconds)
    taken = round(time.perf_counter() - start, 1)
    if failed:
        print(f"   FAILED: {failed}", flush=True)
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)
        return failed
    part = result.with_suffix(".part")
    part.write_text(json.dumps({"seconds": taken, "command": line[1:], "result": _last_line(printed)}, allow_nan=False))
    part.rename(result)
    printed.unlink()
    print(f"   ok, {taken:.0f} s", flush=True)
    return None


def run_stage(name: str, one: Session, force: bool) -> dict:
    """Do what is left of a stage; returns its summary, which is written to $OUT/NAME.json too."""
    folder, start = one.out / name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    one.data.mkdir(parents=True, exist_ok=True)
    failed, left, found = {}, [], {}
    for step in STAGES[name](one):
        path, makes = folder / f"{step.name}.json", step.makes
        whole = read(path) is not None and (makes is None or makes.exists())
        shared = makes is not None and makes.exists() and one.data in makes.parents  # made by another stage
        seconds = STAGE_SECONDS - (time.perf_counter() - start)
        if (whole or shared) and not force:
            print(f"== {step.name}: there already", flush=True)
        elif seconds < LEAST:
            left.append(step.name)
        else:
            if step.clear:
                shutil.rmtree(step.clear, ignore_errors=True)
            if words := run(step, folder, min(step.seconds, seconds)):
                failed[step.name] = words
        if result := read(path):
            found[step.name] = result
    summary = {
        "stage": name, "device": one.device, "rows": one.rows, "seconds": round(time.perf_counter() - start, 1),
        "failed": failed, "left": left, "machine": machine.describe(), "steps": found,
    }  # fmt: skip
    (one.out / f"{name}.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    return summary


def main(argv: list[str]) -> int:
    """Run the stages named, or all; returns the exit status: 1 where a step failed or is left."""
    unknown = [name for name in argv if name not in STAGES]
    if unknown:
        print(f"error: {unknown[0]}: expected stages out of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    one, force = session(), bool(os.environ.get("FORCE"))
    done = [run_stage(name, one, force) for name in argv or STAGES]
    for summary in done:
        ends = [f"{name} failed" for name in summary["failed"]] + [f"{name} left" for name in summary["left"]]
        print(f"{summary['stage']}: {summary['seconds']:.0f} s, {', '.join(ends) or 'all done'}")
    stages = {summary["stage"]: {key: summary[key] for key in ("seconds", "failed", "left")} for summary in done}
    print(json.dumps({"out": str(one.out), "stages": stages}, allow_nan=False))
    return 1 if any(summary["failed"] or summary["left"] for summary in done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
