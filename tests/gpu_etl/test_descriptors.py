"""However many files an encode appends to, the descriptors that it takes stay few."""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_etl import append
from gpu_etl.append import Appended
from gpu_etl.doctor.specification import write_rows
from tests.conftest import ROOT

LIMIT = 80
# Encodes the days that are named, as 512 buckets, under a limit of the descriptors; prints how many there were at most.
SCRIPT = """
import os, resource, sys
from pathlib import Path
from gpu_etl import cpu, shuffle
from gpu_etl.pipeline import encode_days
from gpu_etl.settings import Settings

limit, *days, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
cpu.BUCKET_BYTES, most, add = 1, 0, shuffle.Buckets.add

def counted(self, *arguments):
    global most
    assert len(self) == 512
    add(self, *arguments)
    most = max(most, len(os.listdir("/proc/self/fd")))

shuffle.Buckets.add = counted
encode_days([Path(day) for day in days], Path(out), Settings(slab_bytes=20_000, threads=2))
print(most)
"""


def encoded(days: list[Path], out: Path, limit: int) -> tuple[int, dict[str, bytes]]:
    words = [sys.executable, "-c", SCRIPT, str(limit), *map(str, days), str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_encode_under_a_low_limit(tmp_path):
    days = [tmp_path / f"day_{day}" for day in range(40)]
    for day, path in enumerate(days):
        path.write_bytes(write_rows(seed=day, rows=40))
    most, few = encoded(days, tmp_path / "few", LIMIT)
    many, plain = encoded(days, tmp_path / "many", 1000)
    assert few == plain
    assert most < LIMIT and many < append.MAX_OPEN + 64


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"file_{place}" for place in range(3000)]
    for path in found:
        path.touch()
    return found


def test_what_is_appended_to_thousands_of_files(paths):
    before, rows = open_files(), np.arange(2 * len(paths)).reshape(2, -1)
    first, second = Appended(paths[:2900]), Appended(paths[2900:])
    share = min(append.MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // append.LIMIT_SHARE)
    for row in rows:
        for place in range(len(paths)):
            files, at = (first, place) if place < 2900 else (second, place - 2900)
            files.append(at, row[place : place + 1])
        assert 0 < open_files() - before <= share
    for place, path in enumerate(paths):
        assert np.fromfile(path, int).tolist() == rows[:, place].tolist()
    for _ in range(2):  # what is given back, twice too, is there for others, but once
        first.close()
    second.close()
    assert open_files() == before
    third = Appended(paths)
    assert open_files() - before == share
    del third
    gc.collect()
    fourth = Appended(paths)
    assert open_files() - before == share
    fourth.close()


def test_a_file_that_is_gone_is_not_made_anew(paths):
    files = Appended(paths)
    paths[-1].unlink()
    with pytest.raises(FileNotFoundError):
        files.append(len(paths) - 1, np.zeros(1))
    files.close()
    assert not paths[-1].exists()
