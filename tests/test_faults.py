"""Faults of readers while train.py runs: a clear error, an intact last checkpoint to go on from, and no hang."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import train
from gpu_etl.load import dataset
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import ROOT, needs

FLAGS = [
    "--batch_size", "32", "--test_batch_size", "200", "--lr", "0.01", "--warmup_steps", "5", "--auc_threshold", "1",
    "--epochs", "1", "--save_freq", "8", "--test_freq", "1000", "--model_config", "criteo_kaggle_tiny",
    "--threads", "2", "--keep", "100", "--prefetch", "1",
]  # fmt: skip
LOADERS = {
    "cpu": [], "dali": ["--loader", "dali"], "rows": ["--shuffle_buffer_size", "90"],
    "dali_rows": ["--loader", "dali", "--shuffle_buffer_size", "90"],
}  # fmt: skip

# Runs train.py with its flags; at step 11 (of 26 an epoch) the fault strikes. Units are of one batch, so that most of
# the epoch is still to be read then.
CHILD = """
import errno, os, sys
import train
from gpu_etl.load import order, sources
from model.training import trainer

fault, path, *words = sys.argv[1:]
order.UNIT_ROWS = 1
real_step, real_read, real_preadv, struck = trainer.Trainer.step, sources.RecordFile.read_into, os.preadv, []

def step(self, batch):
    if self.steps + 1 == 11:
        struck.append(1)
        if fault == "truncated":
            os.truncate(path, 160)
    return real_step(self, batch)

def preadv(descriptor, buffers, offset):
    if struck and fault == "disk":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real_preadv(descriptor, buffers, offset)

def read_into(self, begin, end, block):
    if struck and fault == "thread":
        raise SystemExit("the thread is gone") if "SystemExit" in os.environ else MemoryError("no memory left")
    return real_read(self, begin, end, block)

trainer.Trainer.step, sources.RecordFile.read_into, os.preadv = step, read_into, preadv
sys.exit(train.main(words))
"""
WORDS = {
    "truncated": "terabyte_processed_train.bin: expected 5,120 bytes at",
    "disk": "terabyte_processed_train.bin: Input/output error",
    "thread": "train.bin: the thread that reads batches ahead of epoch 1 failed: MemoryError: no memory left",
}


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def flags(folder, out, loader):
    return ["--dataset", str(folder), "--output_dir", str(out), *FLAGS, *LOADERS[loader]]


def digests(checkpoint):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.iterdir() if p.suffix != ".json"}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The end of undisturbed runs, by whether rows change places."""
    ends = {}
    for loader in ("cpu", "rows"):
        out = tmp_path_factory.mktemp(loader)
        assert train.main(flags(folder, out, loader)) == 0
        ends["rows" in loader] = digests(out / "step_26")
    assert ends[False] != ends[True]
    return ends


@needs("nvidia.dali")
@pytest.mark.parametrize(
    ("fault", "loader"), [("truncated", "cpu"), ("truncated", "dali_rows"), ("disk", "rows"), ("thread", "dali")]
)
def test_a_fault_ends_training_and_it_can_go_on(folder, whole, tmp_path, fault, loader, capsys):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    path, out = copy / "terabyte_processed_train.bin", tmp_path / "out"
    words = [sys.executable, "-c", CHILD, fault, str(path), *flags(copy, out, loader)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert WORDS[fault] in done.stderr.rpartition("error: ")[2]
    saved = sorted(int(path.name.removeprefix("step_")) for path in out.glob("step_*"))
    assert saved[0] == 8 and saved[-1] < 26  # some batches were read ahead already
    shutil.copy(folder / path.name, path)
    assert train.main([*flags(copy, out, loader), "--ckpt", str(out)]) == 0
    assert digests(out / "step_26") == whole["rows" in loader]


def test_a_reader_that_leaves_without_a_word_is_no_hang(folder, tmp_path):
    words = [sys.executable, "-c", CHILD, "thread", "", *flags(folder, tmp_path, "cpu")]
    environment = os.environ | {"SystemExit": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "the thread is gone" in done.stderr and not done.stdout


@needs("nvidia.dali")
def test_all_loaders_and_caches_train_alike(folder, tmp_path, whole, capsys):
    for name, more in (("a", ["--loader", "dali"]), ("b", ["--cache", "device"])):
        for loader in ("cpu", "rows"):
            out = tmp_path / f"{name}_{loader}"
            assert train.main([*flags(folder, out, loader), *more]) == 0
            assert digests(out / "step_26") == whole[loader == "rows"]
    said = capsys.readouterr().err
    assert "device-resident loader on cpu" in said and "DALI loader on cpu, by DALI's CPU pipeline" in said


def test_going_on_in_the_midst_of_a_window(folder, tmp_path, whole, capsys):
    out = tmp_path / "out"
    assert train.main(flags(folder, out, "rows")) == 0
    for step in (8, 16):  # both within a window of 3 batches
        again = tmp_path / f"from_{step}"
        ckpt = ["--ckpt", str(out / f"step_{step}")]
        assert train.main([*flags(folder, again, "rows"), *ckpt]) == 0
        assert digests(again / "step_26") == whole[True]
    capsys.readouterr()
    assert train.main([*flags(folder, out, "cpu"), "--ckpt", str(out / "step_8")]) == 1
    assert "shuffle_buffer_size 90 there, 0 here" in capsys.readouterr().err


def test_a_loss_that_is_no_number_tells_what_it_can(folder, tmp_path, capsys):
    lr = ["--lr", "1e30"]
    for loader, rows in (("cpu", True), ("rows", False)):
        assert train.main([*flags(folder, tmp_path / loader, loader), *lr]) == 1
        said = capsys.readouterr().err
        assert "the loss is" in said and ("of the training split" in said) == rows


def test_torchrec_days_train(folder, tmp_path, capsys):
    records = dataset.open_dataset(folder).splits["train"].read(0, 801)
    for day, rows in enumerate((records[:400], records[400:700], records[700:])):
        np.save(tmp_path / f"day_{day}_labels.npy", rows[:, :1])
        np.save(tmp_path / f"day_{day}_dense.npy", np.log(rows[:, 1:14].astype(np.float32) + 2))
        np.save(tmp_path / f"day_{day}_sparse.npy", rows[:, 14:])
    model = tmp_path / "model.json"
    model.write_text(json.dumps({
        "num_numerical_features": 13, "categorical_feature_sizes": (records[:, 14:].max(0) + 1).tolist(),
        "bottom_mlp_sizes": [8, 4], "top_mlp_sizes": [8, 1], "embedding_dim": 4,
    }))  # fmt: skip
    words = ["--dataset", str(tmp_path), "--model_config", str(model), "--lr", "0.1", "--batch_size", "64"]
    assert train.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 11 and result["test"]["rows"] == 50 and result["validation"][-1]["rows"] == 51
