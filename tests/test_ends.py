"""How train.py ends where data, disk, memory or signals end it: a line of words, a status, nothing half done."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train
from gpu_etl.load.scores import ScoreWriter
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import COLUMN_NAMES
from model import inference, outcome
from model.checkpoint import files as checkpoint
from model.dlrm import DLRM
from tests.conftest import ROOT, needs
from tests.model.helpers import small_config

QUICK = ["--model_config", "criteo_kaggle_tiny", "--batch_size", "256", "--lr", "0.05", "--warmup_steps", "2",
         "--auc_threshold", "1", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(day_files, tmp_path_factory):
    """(data set, run's folder with one checkpoint)."""
    out = tmp_path_factory.mktemp("trained")
    encode_days(day_files, out / "set", Settings())
    assert train.main(["--dataset", str(out / "set"), *QUICK, "--save_model", "--output_dir", str(out / "run")]) == 0
    return out / "set", out / "run"


def run(capsys, *words):
    capsys.readouterr()
    status = train.main([str(word) for word in words])
    said = capsys.readouterr()
    return status, json.loads(said.out.splitlines()[-1]) if said.out else None, said.err


def process(*words, **more):
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        **{"stdout": subprocess.PIPE, **more},
    )  # fmt: skip


def predict(trained, *words):
    return ["--mode", "predict", "--ckpt", trained[1], *words]


def test_skipped_rows_keep_their_lines(trained, day_files, tmp_path, capsys):
    """Bad rows at the start, in the midst, side by side and at the end; a line of scores for each line of the day."""
    lines = day_files[2].read_bytes().splitlines(keepends=True)
    bad, good = tmp_path / "bad", tmp_path / "good.parquet"
    places = [0, 7, 8, 100, 254, 255]
    rows = list(lines)
    for place in places:
        rows.insert(place, b"1\t2\n")
    bad.write_bytes(b"".join(rows))
    assert run(capsys, *predict(trained, "--input", day_files[2], "--output", good))[0] == 0
    words = predict(trained, "--input", bad, "--output", tmp_path / "s.parquet")
    status, result, said = run(capsys, *words)
    assert status == 1 and result is None and "row 1: expected 40 tab-separated fields, got 2" in said
    status, result, said = run(capsys, *words, "--bad_rows", "skip")
    found, expected = pq.read_table(tmp_path / "s.parquet"), pq.read_table(good)
    assert status == 0 and "6 rows could not be parsed: their scores are null, in their places" in said
    for name in ("score", "label"):
        values = found[name].to_pylist()
        assert [place for place, value in enumerate(values) if value is None] == places
        assert [value for value in values if value is not None] == expected[name].to_pylist()
    assert (result["rows"], result["scored"], sum(result["bad_rows"].values())) == (257, 251, 6)
    status, _, said = run(capsys, *words, "--bad-rows", "skip", "--max-bad-rows", "5")
    assert status == 1 and "More than --max-bad-rows 5" in said


def no_rows(tmp_path: Path) -> list[Path]:
    empty = tmp_path / "empty.gz"
    empty.write_bytes(gzip.compress(b""))
    table = tmp_path / "none.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.int64() if place < 14 else pa.string())
                             for place, name in enumerate(COLUMN_NAMES)}), table)  # fmt: skip
    return [empty, table]


def test_no_rows_have_no_scores(trained, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(b"1\t2\n" * 3)
    for path in (*no_rows(tmp_path), bad):
        words = predict(trained, "--input", path, "--output", tmp_path / "s.parquet", "--bad_rows", "skip")
        status, result, said = run(capsys, *words)
        assert status == 1 and result is None and said.splitlines()[-1].startswith(f"error: {path}: "), said
    assert not list(tmp_path.glob("s.parquet*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_predict_that_is_ended_leaves_nothing_to_the_next(trained, day_files, tmp_path, number):
    text, out, feed = day_files[2].read_bytes(), tmp_path / "s.parquet", tmp_path / "day"
    feed.write_bytes(text * 2000)
    part = out.with_name("s.parquet.part")
    child = process(*predict(trained, "--input", feed, "--output", out))
    while not part.exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number), said
    assert "Traceback" not in said and not out.exists()
    if number == signal.SIGKILL:
        assert part.exists()
        feed.write_bytes(text)
        assert process(*predict(trained, "--input", feed, "--output", out)).wait(60) == 0
        assert pq.read_table(out).num_rows == 251
    else:
        assert said.splitlines()[-1] == ("terminated" if number == signal.SIGTERM else "interrupted")
    assert not part.exists()


@pytest.fixture
def files_up_to():
    """Sets a limit on the size of files, beyond which writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [2, 600])  # the file's first bytes, or a block of scores
def test_scores_on_a_disk_that_is_full(tmp_path, files_up_to, size):
    path = tmp_path / "scores.parquet"
    with pytest.raises(OSError, match=rf"File too large: '{path}'$"):
        files_up_to(size)
        with ScoreWriter(path, labelled=False) as writer:
            writer.write(np.random.default_rng(0).random(1000, np.float32), np.zeros(1000, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_a_disk_without_room(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    status, _, said = run(capsys, "--mode", "export", "--ckpt", trained[1], "--output", tmp_path / "model.pt2")
    assert status == 1 and "model.pt2: No space left on device: about " in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "words"), [("/dev/full", "No space left on device"), ("pipe", "Broken pipe")])
def test_nobody_takes_the_result(trained, target, words):
    if target == "pipe":
        reader, stdout = os.pipe()
        os.close(reader)
    else:
        stdout = os.open(target, os.O_WRONLY)
    child = process("--mode", "test", "--ckpt", trained[1], stdout=stdout)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1 and said.splitlines()[-1] == f"error: the result, on standard output: {words}", said


def test_debug_shows_where_an_error_arose(capsys):
    for more, shown in ([], False), (["--debug"], True):
        status, _, said = run(capsys, "--dataset", "/nowhere", *more)
        assert status == 1 and ("Traceback" in said) == shown and said.splitlines()[-1].startswith("error: /nowhere: ")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(), 1, "error: OSError"),
        (OSError("no name"), 1, "error: no name"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (OSError(2, "No such file", b"x\xff"), 1, "error: x\udcff: No such file"),
        (OSError(9, "Bad file descriptor", 7), 1, "error: Bad file descriptor"),
        (MemoryError(), 1, f"error: out of memory: no memory left; {outcome.MEMORY_REMEDY}"),
        (torch.OutOfMemoryError("tried to allocate 20.00 GiB"), 1,
         f"error: out of memory: 20.00 GiB more were wanted; {outcome.MEMORY_REMEDY}"),
        (ModuleNotFoundError("no", name="onnx"), 1, "error: the package onnx is missing: pip install onnx"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (outcome.TerminatedError(), 143, "terminated"),
    ],
)  # fmt: skip
def test_words_of_what_is_expected(error, status, words):
    assert outcome.explain(error) == (status, words)


def test_what_nobody_expects_keeps_its_traceback():
    assert outcome.explain(ZeroDivisionError("x")) is None
    with pytest.raises(ZeroDivisionError):
        outcome.run(lambda: {"x": 1 / 0}, (), False)


def test_the_test_split_may_have_one_row(trained, tmp_path, capsys):
    """An export takes nothing from it."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "test"):
        rows = np.fromfile(trained[0] / f"terabyte_processed_{name}.bin", np.int32).reshape(-1, 40)
        rows[: 1 if name == "test" else None].tofile(folder / f"terabyte_processed_{name}.bin")
    words = ["--mode", "export", "--ckpt", trained[1], "--dataset", folder, "--output", tmp_path / "m.pt2"]
    status, result, said = run(capsys, *words)
    assert status == 0 and result["files"] == [str(tmp_path / "m.pt2")], said
    program = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 2, 100):
        assert program(torch.zeros(count, 13), torch.zeros(count, 26, dtype=torch.int32)).shape == (count,)


@needs("onnxscript")
def test_an_export_names_all_its_files_and_leaves_none_of_the_one_before(tmp_path, monkeypatch):
    big, small = (DLRM(small_config(categorical_feature_sizes=(size,) * 4)) for size in (20_000, 5))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx.part").mkdir()
    (tmp_path / "m.onnx.part" / "left").write_text("by a process that was killed")
    assert inference.export(big, Path("m.onnx")) == [Path("m.onnx"), Path("m.onnx.data")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    files = inference.export(small, Path("m.onnx"))
    assert sorted(map(str, files)) == sorted(path.name for path in tmp_path.iterdir())
    # An exporter that keeps small weights in the file itself, as torch's once did.
    monkeypatch.setitem(inference.WRITERS, ".onnx", lambda model, path, *_: path.write_bytes(b"all of it"))
    assert inference.export(small, Path("m.onnx")) == [Path("m.onnx")]
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_of_a_checkpoint_may_be_read_by_the_same(trained, tmp_path, capsys, umask, mode):
    before = os.umask(umask)
    try:
        run(capsys, "--dataset", trained[0], *QUICK, "--save_model", "--output_dir", tmp_path / "run")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.find(tmp_path / "run").iterdir()}
    assert len(found) == 4 and set(found.values()) == {mode}
