"""How python -m gpu_etl ends: signals, closed and full outputs, errors of the system, and what is no user's fault."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gpu_etl import outcome
from gpu_etl.__main__ import main
from gpu_etl.errors import DataError
from tests.conftest import ROOT


def run(words, **more):
    command = [sys.executable, "-m", "gpu_etl", *map(str, words)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, cwd=ROOT, env=buffered, stderr=subprocess.PIPE, text=True, timeout=120, **more)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_an_encode_that_can_go_on(tmp_path, number, status, word):
    assert main(["synth", "--out", str(tmp_path / "days"), "--rows", "20000"]) == 0
    words = ["encode", tmp_path / "days", "--out", tmp_path / "set", "--slab-bytes", "1024"]
    command = [sys.executable, "-m", "gpu_etl", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    journal = tmp_path / "set" / ".work" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 5000):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and not out, err
    assert err.splitlines()[-1] == f"{word}; an encode goes on where it was when given the same command again"
    assert "Traceback" not in err
    done = run(words, stdout=subprocess.PIPE)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["resumed"]


def test_a_result_that_nobody_reads_is_said(tmp_path):
    words = ["synth", "--out", tmp_path, "--rows", "100"]
    read, write = os.pipe()
    os.close(read)
    done = run(words, stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: stdout: Broken pipe; the work is done")
    with open("/dev/full", "w") as full:
        done = run(words, stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: stdout: No space left on device; the work is done")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (DataError("x: wrong"), 1, "error: x: wrong"),
        (OSError(errno.EIO, "Input/output error", "a/b"), 1, "error: a/b: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error"),
        (OSError(errno.EIO, "Input/output error", ""), 1, "error: Input/output error"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), 1, "error: a -> b: Invalid link"),
        (OSError(errno.EIO, "Input/output error", b"a\xff"), 1, "error: a\udcff: Input/output error"),
        (OSError(errno.EBADF, "Bad file", 7), 1, "error: Bad file"),
        (TimeoutError(), 1, "error: TimeoutError"),
        (MemoryError(), 1, "error: not enough memory (an allocation failed): lower --slab-bytes"),
        (KeyboardInterrupt(), 130, "interrupted; go on"),
        (outcome.Terminated(), 143, "terminated; go on"),
    ],
)  # fmt: skip
def test_words_and_status(error, status, words):
    found, said = outcome.explain(error, "go on")
    assert found == status and said.startswith(words)
    assert "error: :" not in said


def test_what_is_no_users_fault_stays_a_traceback():
    with pytest.raises(ZeroDivisionError):
        outcome.explain(ZeroDivisionError())


def test_debug_shows_where_an_error_came_from(tmp_path, monkeypatch, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("GPU_ETL_DEBUG", "1")
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith(f"error: {tmp_path}/manifest.json: no such file")


def test_a_caller_keeps_its_handler_of_sigterm():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with outcome.signals():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    with outcome.signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) == before
