"""Damage files of a work folder or a data set at random, and go on: every end is the right bytes, or an error.

    python -m tests.gpu_etl.damage --rounds 67

Ways: flip a byte, cut the file, delete it, append to it, swap it with another run's file of the same name.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.commands.verify import verify
from gpu_etl.common.errors import DataError
from gpu_etl.passes import encode as encoding
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import ROOT
from tests.gpu_etl.test_resume import BUCKET, CHILD, STEP, digests
from tests.reference import write_rows

WAYS = ("flip", "cut", "delete", "append", "swap")


@dataclass(frozen=True)
class Case:
    """A kind of run: what it encodes, and at which of its writes it is killed."""

    name: str
    settings: Settings
    days: int
    kills: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.99)


CASES = (
    Case("shuffled", Settings(slab_bytes=20_000, seed=5), 3),
    Case("in order, dist", Settings(slab_bytes=20_000, seed=5, shuffle=False, form="dist"), 3),
    Case("one file cut into days", Settings(slab_bytes=20_000, seed=5, days=3), 1),
)


def damage(path: Path, way: str, rand: random.Random, other: Path) -> bool:
    """Damage a file in a way; False where that way is none here. other: the same file of another run."""
    if way == "delete":
        path.unlink()
    elif way == "append":
        with open(path, "ab") as file:
            file.write(rand.randbytes(rand.choice([1, 8, 168, 1000])))
    elif way == "swap":
        if not other.is_file() or other.read_bytes() == path.read_bytes():
            return False
        shutil.copyfile(other, path)
    else:
        data = bytearray(path.read_bytes())
        if not data:
            return False
        spot = rand.randrange(len(data))
        if way == "flip":
            data[spot] ^= 1 << rand.randrange(8)
        else:
            del data[spot:]
        path.write_bytes(data)
    return True


def files(folder: Path) -> list[Path]:
    """All files in a folder, named from it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def make_days(folder: Path, count: int, seed: int) -> list[Path]:
    """Small day files."""
    folder.mkdir(parents=True)
    days = [folder / f"day_{day}" for day in range(count)]
    for day, path in enumerate(days):
        path.write_bytes(write_rows(seed=seed + day, rows=(500, 301, 251)[day]))
    return days


def killed(case: Case, days: list[Path], folder: Path) -> list[Path]:
    """Folders with what is left of runs that were killed at the case's points."""
    fields = {key: getattr(case.settings, key) for key in ("slab_bytes", "seed", "shuffle", "form", "days")}
    child, changed = re.subn(r"(?m)^settings = .*$", f"settings = Settings(**{fields}, threads=1)", CHILD)
    assert changed == 1

    def run(point: int, out: Path) -> str:
        words = [sys.executable, "-c", child, str(point), "torn" if point % 2 else "", str(out), *map(str, days)]
        env = os.environ | {"STEP": str(STEP), "BUCKET": str(BUCKET), "WRITERS": str(1 + point % 3)}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        return done.stdout

    writes = int(run(0, folder / "whole"))
    outs = [folder / f"killed_{i}" for i in range(len(case.kills))]
    for share, out in zip(case.kills, outs, strict=True):
        run(max(1, int(writes * share)), out)
    return outs


def go_on(days: list[Path], out: Path, settings: Settings) -> str:
    """Encode, as a user would give the command again; the error that came, "" for none."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            encode_days(days, out, settings)
    except (DataError, OSError) as error:
        return str(error)
    return ""


def check(out: Path) -> str:
    """Verify a data set; the error that came, "" for none."""
    try:
        verify(out)
    except DataError as error:
        return str(error)
    return ""


def rounds(case: Case, folder: Path, number: int, seed: int, work: bool) -> Counter:
    """Damage so many files each way and go on. Returns how often which end came of which way; "wrong" is none that may.

    work: of work folders, or of whole data sets, which are verified.
    """
    rand = random.Random(seed)
    days, others = (make_days(folder / name, case.days, seed) for name, seed in (("days", 0), ("others", 50)))
    states, of_others = killed(case, days, folder / "runs"), killed(case, others, folder / "other_runs")
    if not work:
        states, of_others = [folder / "runs" / "whole"], [folder / "other_runs" / "whole"]
    expected, ends = digests(folder / "runs" / "whole"), Counter()
    for way in WAYS:
        done = 0
        while done < number:
            place = rand.randrange(len(states))
            name = rand.choice(files(states[place]))
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(states[place], out)
            if not damage(out / name, way, rand, of_others[place] / name):
                continue
            done += 1
            error = go_on(days, out, case.settings) if work else check(out)
            end = "error" if error else "right" if digests(out) == expected else "wrong"
            ends[way, end] += 1
            if end != "right" and (work or end == "wrong"):
                print(f"{end}: {case.name}, {states[place].name}, {name}, {way}: {error}", file=sys.stderr)
    return ends


def main(argv: list[str] | None = None) -> int:
    """Run all cases; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=67, metavar="N", help="of each way, case and kind (default: 67)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cpu.ENCODE_ROWS = encoding.SCATTER_ROWS = STEP
    cpu.BUCKET_BYTES = BUCKET
    found = {}
    for case in CASES:
        for work in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                ends = rounds(case, Path(folder), args.rounds, args.seed, work)
            found[f"{case.name}: {'work folder' if work else 'data set'}"] = {
                " ".join(key): count for key, count in sorted(ends.items())
            }
    print(json.dumps(found, indent=1), file=sys.stderr)
    print(json.dumps(found))
    return int(any("wrong" in key for ends in found.values() for key in ends))


if __name__ == "__main__":
    sys.exit(main())
