"""What becomes of an encode whose Dask scheduler or workers are missing, killed, stopped, or not what they should be:
an exit status, one line of words, and work that the same command goes on with."""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("dask.distributed")

from gpu_etl.__main__ import main
from gpu_etl.cluster.probe import code_digest
from tests import reference
from tests.gpu_etl.dask_processes import ROOT, Processes
from tests.gpu_etl.test_cluster import environment  # noqa: F401 - what Dask puts there must not stay

SECONDS = "5"


@pytest.fixture(scope="module")
def two_days(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for day in range(2):
        (folder / f"day_{day}").write_bytes(reference.write_rows(seed=day, rows=4000))
    return [str(folder / f"day_{day}") for day in range(2)]


@pytest.fixture(scope="module")
def expected(two_days, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "set"
    assert main(["encode", *two_days, "--out", str(out)]) == 0
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.is_file()}


def encode(days, out: Path, address: str, *more: str) -> int:
    words = "--scheduler", address, "--threads", "1", "--slab-bytes", "3000", "--worker-timeout", SECONDS, *more
    return main(["encode", *days, "--out", str(out), *words])


def last_line(capfd) -> str:
    """The error of a command, which must be all that it said at its end: one line, no traceback."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said.rstrip().endswith(lines[0])
    return lines[0]


def meanwhile(out: Path, event) -> threading.Thread:
    """Call event() once the first part is being counted; the thread must have ended before the command."""

    def wait() -> None:
        journal = out / ".work" / "part_0" / "journal.jsonl"
        while not (journal.is_file() and journal.read_bytes().count(b"\n") > 20):
            time.sleep(0.002)
        assert not (out / ".work" / "part_0" / "counts.npz").exists()
        event()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_no_worker_comes(two_days, tmp_path, capfd):
    with Processes() as processes:
        assert encode(two_days, tmp_path / "set", processes.address, "--worker-timeout", "1.5") == 1
    assert re.search(r"no worker has come within 1.5 s .*start some, `dask worker tcp://", last_line(capfd))
    assert not (tmp_path / "set").exists()


def test_a_server_that_says_nothing(two_days, tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert encode(two_days, tmp_path / "set", address, "--worker-timeout", "0.5") == 1
    assert f"--scheduler {address}: no Dask scheduler answers there within 0.5 s" in last_line(capfd)
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_the_scheduler_is_killed(two_days, expected, tmp_path, capfd):
    out = tmp_path / "set"
    with Processes() as processes:
        processes.start_workers(1)
        thread = meanwhile(out, processes.scheduler.kill)
        assert encode(two_days, out, processes.address) == 1
        assert not thread.is_alive()
        assert "is gone, or has dropped the tasks of this run; the work in" in last_line(capfd)
        assert (out / ".work" / "part_0" / "journal.jsonl").is_file()
        processes.start_scheduler()
        processes.start_workers(1)
        assert encode(two_days, out, processes.address) == 0
    assert digests(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["all are killed", "one is stopped"])
def test_workers_are_killed_or_stopped(two_days, expected, tmp_path, capfd, blow):
    out = tmp_path / "set"
    with Processes() as processes:
        processes.start_workers(2)
        struck, sign = (
            (processes.workers[:1], signal.SIGSTOP) if "stop" in blow else (processes.workers[:], signal.SIGKILL)
        )
        thread = meanwhile(out, lambda: [os.kill(worker.pid, sign) for worker in struck])
        assert encode(two_days, out, processes.address) == 1
        assert not thread.is_alive()
        said = last_line(capfd)
        assert "no task has ended and no worker at one was heard of for" in said and f"the work in {out}" in said
        assert all(f"process {worker.pid}" in said for worker in struck)
        for worker in struck:
            worker.kill()
            worker.wait()
        if len(struck) == 2:
            processes.start_workers(1)
        assert encode(two_days, out, processes.address) == 0
    assert digests(out) == expected


def test_code_is_sent_to_workers_without_it(two_days, tmp_path, capfd):
    days = [tmp_path / name for name in ("day_0", "day_1")]
    for day, whole in zip(days, two_days, strict=True):
        day.write_bytes(b"".join(Path(whole).read_bytes().splitlines(keepends=True)[:30]))
    words = [str(day) for day in days]
    assert main(["encode", *words, "--out", str(tmp_path / "one")]) == 0
    with Processes() as processes:
        processes.start_workers(1, project=None, NUMBA_DISABLE_JIT="1")  # compiling takes longer than the rows
        assert encode(words, tmp_path / "set", processes.address) == 0
        assert "1 workers do not have this project: its code is sent to them" in capfd.readouterr().err
        assert digests(tmp_path / "set") == digests(tmp_path / "one")
        Path(words[0]).write_bytes(b"not a row\n")
        assert encode(words, tmp_path / "bad", processes.address) == 1
    assert "day_0: row 1: expected 40 tab-separated fields, got 1" in last_line(capfd)


def other_code(folder: Path) -> dict:
    for package in ("gpu_etl", "common"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "load", "doctor")
        )
    return {"project": folder}


def other_numba(folder: Path) -> dict:
    (folder / "numba-0.1.dist-info").mkdir()
    (folder / "numba-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 0.1\n")
    return {"project": None, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (other_code, r"another state of this project's code than that of this command"),
        (other_numba, r"numba 0\.1; this command: python 3\.\d+\.\d+, dask .*numba \d.*make one environment"),
    ],
)
def test_workers_with_other_versions_are_refused(two_days, tmp_path, capfd, worker, expected):
    (tmp_path / "other").mkdir()
    with Processes() as processes:
        processes.start_workers(1, **worker(tmp_path / "other"))
        assert encode(two_days, tmp_path / "set", processes.address) == 1
    assert re.search(expected, last_line(capfd))
    assert not (tmp_path / "set").exists()


def test_a_worker_that_is_older_than_its_files_is_refused(two_days, tmp_path, capfd):
    settings = other_code(tmp_path)["project"] / "gpu_etl" / "passes" / "settings.py"
    text = settings.read_text()
    settings.write_text(f"{text}# of yesterday\n")
    for package in ("load", "doctor"):
        shutil.copytree(ROOT / "gpu_etl" / package, tmp_path / "gpu_etl" / package)
    with Processes() as processes:
        processes.start_workers(1, project=tmp_path)
        settings.write_text(text)
        assert code_digest(tmp_path) == code_digest(ROOT)
        assert encode(two_days, tmp_path / "set", processes.address) == 1
    assert "another state of this project's code than that of this command" in last_line(capfd)


def can_hide() -> bool:
    """Whether a process can be started here that sees other folders than this one, as one of another machine does."""
    words = "unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_hide(), reason="mount namespaces are not allowed here (they need root)")
@pytest.mark.parametrize("hidden", ["days", "work"])
def test_workers_that_see_other_folders_are_refused(two_days, tmp_path, capfd, hidden):
    for name in ("days", "work"):
        (tmp_path / name).mkdir()
    words = [shutil.copy(day, tmp_path / "days") for day in two_days]
    with Processes() as processes:
        processes.start_workers(1, hidden=tmp_path / hidden)
        assert encode(words, tmp_path / "work" / "set", processes.address) == 1
    where = rf"{re.escape(words[0])}: expected .* bytes, .*, found there: " if hidden == "days" else r"set/\.work: "
    assert re.search(
        rf"{where}No such file.*all workers must see the same files under the same paths", last_line(capfd)
    )
    assert not (tmp_path / "work" / "set").exists()
