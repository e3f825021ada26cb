"""Runs killed with SIGKILL at many points of both passes end with the same bytes when started again."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.commands.verify import verify
from gpu_etl.common.errors import DataError
from gpu_etl.passes import buckets as shuffle, encode as encoding
from gpu_etl.passes.journal import Journal
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import ROOT

STEP, BUCKET = 100, 40_000
SETTINGS = Settings(slab_bytes=20_000, seed=5)

# Encodes the days given; before (or, "torn", in the middle of) the write number POINT, it kills itself. Prints how many
# there were.
CHILD = """
import os, signal, sys
from pathlib import Path
import threading
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.passes import encode as encoding, journal, buckets as shuffle, coded_rows as spill
from gpu_etl.dataset import formats
from gpu_etl import pipeline
from gpu_etl.pipeline import Settings

point, torn, out, *days = sys.argv[1:]
cpu.ENCODE_ROWS = encoding.SCATTER_ROWS = int(os.environ["STEP"])
cpu.BUCKET_BYTES = int(os.environ["BUCKET"])
cpu.CORES_PER_WRITER = 1 / int(os.environ["WRITERS"])  # of the one thread that is asked for
cpu.CORES_PER_READER = 1 / int(os.environ["WRITERS"])
calls = 0
lock = threading.Lock()

def deadly(owner, name, half=None):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global calls
        with lock:
            calls += 1
            now = calls == int(point)
        if now:
            if torn == "torn" and half:
                real(*half(*args))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)

deadly(spill.Spill, "add", lambda self, day, coded: (self, day, coded[: len(coded) // 2]))
deadly(spill.Spill, "add_keys", lambda self, keys: (self, [column[: len(column) // 2] for column in keys]))
deadly(shuffle.Buckets, "add", lambda self, numbered, ends: (self, numbered, ends.clip(0, ends[-1] // 2)))
deadly(formats.SplitWriter, "write", lambda self, records: (self, records[: len(records) // 2]))
deadly(journal.Journal, "record")
deadly(Path, "rename")
settings = Settings(slab_bytes=20_000, seed=5, form=os.environ["FORM"], threads=1)
pipeline.encode_days([Path(day) for day in days], Path(out), settings)
print(calls)
"""


def killed_run(point, torn, out, days, form="records", writers=1):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(point), torn, str(out), *map(str, days)],
        cwd=ROOT, env=os.environ | {"FORM": form, "STEP": str(STEP), "BUCKET": str(BUCKET), "WRITERS": str(writers)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, -9), done.stderr
    return int(done.stdout) if done.returncode == 0 else None


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(cpu, "ENCODE_ROWS", STEP)
    monkeypatch.setattr(encoding, "SCATTER_ROWS", STEP)
    monkeypatch.setattr(cpu, "BUCKET_BYTES", BUCKET)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "writers"), [("records", 1), ("records", 4), ("dist", 3)])
def test_killed_at_any_write_and_started_again(day_files, tmp_path, small_steps, form, writers):
    writes = killed_run(0, "", tmp_path / "whole", day_files, form)
    expected = digests(tmp_path / "whole")
    assert writes > 50
    kills = 20 if form == "records" else 8
    settings = Settings(slab_bytes=3000, seed=5, form=form)  # other slabs than before the kill
    for kill in range(kills):
        out = tmp_path / f"killed_{kill}"
        point = 1 + (writes - 1) * kill // (kills - 1)
        assert killed_run(point, "torn" if kill % 2 else "", out, day_files, form, writers) is None
        assert not (out / "manifest.json").exists()
        for path in out.glob("terabyte_processed_*.bin"):  # a final name only ever holds a whole file
            assert digests(out)[path.name] == expected[path.name]
        encode_days(day_files, out, settings)
        assert digests(out) == expected, f"killed at write {point} of {writes}"


# Runs the command once without a limit into WARM, so that compiled code need not be stored under the limit.
FULL_DISK = """
import contextlib, io, resource, sys
from gpu_etl.__main__ import main
limit, warm, *words = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main([*words[:-1], warm])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
sys.exit(main(words))
"""


@pytest.mark.parametrize("limit", [30_000, 120_000])
def test_a_disk_that_fills_up_is_an_error_and_the_run_can_go_on(day_files, tmp_path, limit):
    # No file may grow beyond the limit: 30,000 bytes stop the count pass, 120,000 the writing of the training split.
    whole, full = tmp_path / "whole", tmp_path / "full"
    words = ["encode", *map(str, day_files), "--slab-bytes", "20000", "--seed", "5", "--out", str(full)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), str(whole), *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    assert f"error: {full}: File too large; mend that, then give the same command again" in done.stderr
    assert [path.name for path in full.iterdir()] == [".work"]
    _, report = encode_days(day_files, full, SETTINGS)
    assert report.resumed and digests(full) == digests(whole)


def test_a_resumed_run_keeps_its_number_of_buckets(day_files, tmp_path, small_steps, monkeypatch):
    killed_run(0, "", tmp_path / "whole", day_files)
    out = tmp_path / "killed"
    assert killed_run(30, "", out, day_files) is None
    count = len(list((out / ".work").glob("bucket_*")))
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 10 * BUCKET)  # as of a device that it suits
    _, report = encode_days(day_files, out, SETTINGS)
    assert count > 3 and report.resumed and digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("form", ["records", "dle"])
def test_bytes_do_not_depend_on_writers_or_buckets(day_files, tmp_path, monkeypatch, form):
    settings = Settings(slab_bytes=20_000, threads=1, form=form)
    encode_days(day_files, tmp_path / "one", settings)
    monkeypatch.setattr(cpu, "CORES_PER_WRITER", 1 / 5)
    monkeypatch.setattr(shuffle, "READ_BYTES", 1000)
    for buckets, size in (("few", 1 << 30), ("many", 2000)):
        monkeypatch.setattr(cpu, "BUCKET_BYTES", size)
        encode_days(day_files, tmp_path / f"{buckets}_five", settings)
        assert digests(tmp_path / f"{buckets}_five") == digests(tmp_path / "one")


def test_killed_twice(day_files, tmp_path, small_steps):
    killed_run(0, "", tmp_path / "whole", day_files)
    out = tmp_path / "killed"
    for point in (9, 30, 5):
        assert killed_run(point, "torn", out, day_files) is None
    _, report = encode_days(day_files, out, SETTINGS)
    assert report.resumed and digests(out) == digests(tmp_path / "whole")


def test_a_resumed_run_does_not_parse_again_what_was_parsed(day_files, tmp_path, monkeypatch):
    assert killed_run(60, "", tmp_path, day_files) is None
    done = [json.loads(line) for line in (tmp_path / ".work" / "journal.jsonl").read_text().splitlines()]
    rows = sum(event["slab"]["read"] for event in done if "slab" in event)
    assert rows > 500
    parsed = []
    real = cpu.parse
    monkeypatch.setattr(cpu, "parse", lambda text, ends, memory: parsed.append(len(ends)) or real(text, ends, memory))
    monkeypatch.setattr(cpu, "ENCODE_ROWS", STEP)
    monkeypatch.setattr(encoding, "SCATTER_ROWS", STEP)
    monkeypatch.setattr(cpu, "BUCKET_BYTES", BUCKET)
    encode_days(day_files, tmp_path, SETTINGS)
    assert sum(parsed) == 1052 - rows
    verify(tmp_path)


def test_an_unfinished_run_of_another_kind_is_not_mixed_in(day_files, tmp_path):
    assert killed_run(12, "", tmp_path, day_files) is None
    before = digests(tmp_path)
    with pytest.raises(DataError, match="unfinished run with other settings"):
        encode_days(day_files, tmp_path, Settings(seed=6))
    with pytest.raises(DataError, match="unfinished run with other sources"):
        encode_days(day_files[:2], tmp_path, SETTINGS)
    assert digests(tmp_path) == before


def test_two_runs_in_one_folder_at_a_time(day_files, tmp_path, small_steps):
    assert killed_run(12, "", tmp_path, day_files) is None
    before = digests(tmp_path)
    journal = Journal(tmp_path / ".work" / "journal.jsonl")
    with pytest.raises(DataError, match="another run is at work"):
        encode_days(day_files, tmp_path, SETTINGS)
    journal.close()
    assert digests(tmp_path) == before


def test_the_same_command_again_is_no_error(day_files, tmp_path):
    made, _ = encode_days(day_files, tmp_path, SETTINGS)
    before = digests(tmp_path)
    again, _ = encode_days(day_files, tmp_path, SETTINGS)
    assert again == made and digests(tmp_path) == before


def test_a_torn_last_line_of_the_journal_is_dropped(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.record(slab={"day": 0})
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"slab": {"da')
    journal = Journal(path)
    journal.record(files={})
    journal.close()
    journal = Journal(path)
    assert journal.events == [{"slab": {"day": 0}}, {"files": {}}]
    journal.close()
