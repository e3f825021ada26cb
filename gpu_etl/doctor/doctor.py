"""The command: the table of what is there, then the checks."""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from gpu_etl.common.errors import DataError
from gpu_etl.doctor import machine
from gpu_etl.doctor.checks import CHECKS, MACHINE, Check, chosen
from gpu_etl.doctor.child import SKIPPED
from gpu_etl.doctor.processes import Ended, run, stop_all

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
MOST_AT_ONCE = 6  # processes, each of which compiles on a core or two


@dataclass(frozen=True)
class Result:
    """result: PASS, FAIL or SKIP; words: the first error, or the reason; seconds: wall-clock."""

    name: str
    result: str
    words: str
    seconds: float


def judge(check: Check, ended: Ended) -> Result:
    """What a check's process says."""
    if ended.status == 0:
        return Result(check.name, PASS, check.line, round(ended.seconds, 1))
    if ended.status == SKIPPED:
        return Result(check.name, SKIP, ended.words(), round(ended.seconds, 1))
    return Result(check.name, FAIL, ended.words(), round(ended.seconds, 1))


def _say(result: Result) -> Result:
    seconds = f"{result.seconds:5.1f} s" if result.seconds else " " * 7
    print(f"{result.result}  {result.name:26} {seconds}  {result.words}", file=sys.stderr, flush=True)
    return result


def _lacking(check: Check, has_gpu: bool, done: dict[str, Result]) -> str:
    """Why a check is not even started; nothing where it may be."""
    if check.needs == "gpu":
        return "" if has_gpu else "no GPU: neither nvidia-smi nor torch shows one"
    if check.needs and done[check.needs].result != PASS:
        return "no GPU: neither nvidia-smi nor torch shows one" if not has_gpu else f"{check.needs} has not passed"
    return ""


def run_all(checks: list[Check], has_gpu: bool, seconds: float, at_once: int, scratch: str) -> list[Result]:
    """Run the checks, those first that others need; each gets so many seconds. A line each, as they end."""
    needed = {check.needs for check in checks}
    done: dict[str, Result] = {}
    for part in ([c for c in checks if c.name in needed], [c for c in checks if c.name not in needed]):
        with ThreadPoolExecutor(at_once) as pool:
            running = {}
            for check in part:
                if words := _lacking(check, has_gpu, done):
                    done[check.name] = _say(Result(check.name, SKIP, words, 0.0))
                else:
                    running[pool.submit(run, ["-m", *check.words], seconds, TMPDIR=scratch)] = check
            try:
                for future in as_completed(running):
                    check = running[future]
                    done[check.name] = _say(judge(check, future.result()))
            except BaseException:  # Ctrl-C: nothing that was started outlives this process
                pool.shutdown(wait=False, cancel_futures=True)
                stop_all()
                raise
    return [done[check.name] for check in checks]


def list_checks() -> None:
    """Say the names on stderr."""
    for check in CHECKS:
        print(f"{check.name:26}  {check.line}", file=sys.stderr)


def main(args: argparse.Namespace) -> dict:
    """Run the doctor command; returns its results; `failed` names the checks that did."""
    start = time.perf_counter()
    if args.list:
        list_checks()
        return {"checks": [check.name for check in CHECKS], "failed": []}
    try:
        checks = chosen(args.only)
    except ValueError as error:
        raise DataError(f"--only {error}: no such check or group; --list shows them") from error
    if not args.out.is_dir():
        raise DataError(f"--out {args.out}: expected a folder, whose disk is measured")
    cards, lines = machine.gpus(), []
    if not args.only or MACHINE in args.only:
        lines = machine.table(cards, machine.ask_all(args.out), args.out)
        print(machine.show(lines) + "\n", file=sys.stderr, flush=True)
    at_once = max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // 2))
    with tempfile.TemporaryDirectory() as scratch:
        results = run_all(checks, bool(cards) or machine.torch_sees_gpu(), args.timeout, at_once, scratch)
    counts = {word: sum(result.result == word for result in results) for word in (PASS, FAIL, SKIP)}
    failed = [check for check, result in zip(checks, results, strict=True) if result.result == FAIL]
    for check in failed:
        print(f"all of {check.name}: python -m {' '.join(check.words)}", file=sys.stderr)
    print(", ".join(f"{count} {word}" for word, count in counts.items()), file=sys.stderr)
    return {
        "machine": {line.name: line.found for line in lines}, "gpus": cards,
        "checks": [asdict(result) for result in results], **{word.lower(): n for word, n in counts.items()},
        "failed": [check.name for check in failed], "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
