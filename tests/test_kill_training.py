"""train.py killed for real, in the middle of steps and of checkpoints, goes on to the same bits."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import train
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import ROOT

FLAGS = [
    "--batch_size", "32", "--test_batch_size", "200", "--lr", "0.01", "--warmup_steps", "5", "--auc_threshold", "1",
    "--epochs", "2", "--save_freq", "4", "--keep", "2", "--test_freq", "9", "--optimizer", "adam",
    "--embedding_optimizer", "rowwise_adagrad", "--embedding_lr", "0.05", "--model_config", "criteo_kaggle_tiny",
    "--threads", "2",
]  # fmt: skip

# Runs train.py with its flags; at step POINT (or in the midst of writing checkpoint number -POINT) it signals itself.
CHILD = """
import os, signal, sys
import safetensors.torch
import train
from model.checkpoint import files as checkpoint
from model.training import trainer

point, number, *words = sys.argv[1:]
point, number = int(point), int(number)
real_step, real_save, saves = trainer.Trainer.step, checkpoint.save_file, 0

def step(self, batch):
    if self.steps + 1 == point:
        os.kill(os.getpid(), number)
    return real_step(self, batch)

def save_file(tensors, path):
    global saves
    saves += 1
    if saves == -point:
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)
    return real_save(tensors, path)

trainer.Trainer.step, checkpoint.save_file = step, save_file
sys.exit(train.main(words))
"""


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def flags(folder, out):
    return ["--dataset", str(folder), "--output_dir", str(out), *FLAGS]


def killed(folder, out, point, number, *more):
    words = [str(point), str(int(number)), *flags(folder, out), *more]
    return subprocess.run([sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True)


def digests(checkpoint):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint.iterdir() if p.suffix != ".json"}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train.main(flags(folder, out)) == 0
    return digests(out / "step_52")


# 26 steps an epoch; checkpoints at steps 4, 8, ..., each of three files.
@pytest.mark.parametrize("point", [2, 5, 13, 26, 27, 40, 52, -2, -8, -12])
def test_killed_and_started_again_ends_with_the_same_bits(folder, tmp_path, whole, point, capsys):
    done = killed(folder, tmp_path, point, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    words = flags(folder, tmp_path)
    saved = [path for path in tmp_path.glob("step_*") if not path.name.endswith(".part")]
    assert bool(saved) == (point not in (2, -2))
    if saved:  # and with the checkpoint's number of threads, where none is asked for
        position = words.index("--threads")
        del words[position : position + 2]
        torch.set_num_threads(1)
    assert train.main([*words, *(["--ckpt", str(tmp_path)] if saved else [])]) == 0
    assert digests(tmp_path / "step_52") == whole
    kept = ["step_48", "step_52"]
    if saved:  # what it went on from stays
        kept = sorted({max(saved, key=lambda path: int(path.name[5:])).name, *kept})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json", *kept]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_first(folder, tmp_path, whole, number, status, capsys):
    done = killed(folder, tmp_path, 15, number)
    assert done.returncode == status and not done.stdout
    assert f"{number.name} after step 15; go on with --ckpt {tmp_path}/step_15" in done.stderr
    assert train.main([*flags(folder, tmp_path), "--ckpt", str(tmp_path)]) == 0
    assert digests(tmp_path / "step_52") == whole


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(folder, tmp_path, capsys):
    assert train.main([*flags(folder, tmp_path), "--epochs", "1"]) == 0
    before = {path.name: digests(path) for path in tmp_path.glob("step_*")}
    # From here no file may be larger than 100 kB; a checkpoint's tables are.
    words = [sys.executable, "train.py", *flags(folder, tmp_path), "--ckpt", str(tmp_path)]
    limit = (100_000, resource.RLIM_INFINITY)
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert {path.name: digests(path) for path in tmp_path.glob("step_*")} == before


def test_a_flipped_bit_is_found(folder, tmp_path, capsys):
    assert train.main([*flags(folder, tmp_path), "--epochs", "1"]) == 0
    path = tmp_path / "step_26" / "tables.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert train.main([*flags(folder, tmp_path), "--ckpt", str(tmp_path)]) == 1
    assert "tables.safetensors: damaged (expected" in capsys.readouterr().err


def test_another_data_set_or_optimiser_is_refused(folder, day_files, tmp_path, capsys):
    assert train.main([*flags(folder, tmp_path), "--epochs", "1"]) == 0
    encode_days(day_files, tmp_path / "other", Settings(seed=1))
    for words, message in (
        (["--dataset", str(tmp_path / "other")], "cannot go on with other data or another order: bytes"),
        (["--optimizer", "adagrad"], "made with the optimisers"),
        (["--seed", "3"], "seed 0 there, 3 here"),
        (["--model_config", "official_config"], "made with another model: bottom_mlp_sizes"),
    ):
        capsys.readouterr()
        assert train.main([*flags(folder, tmp_path), "--ckpt", str(tmp_path), *words]) == 1
        assert message in capsys.readouterr().err
    state = json.loads((tmp_path / "step_26" / "state.json").read_text())
    assert state["run"]["place"]["rows"] == 801


def test_another_number_of_threads_is_told(folder, tmp_path, capsys):
    assert train.main([*flags(folder, tmp_path), "--epochs", "1"]) == 0
    assert train.main([*flags(folder, tmp_path), "--ckpt", str(tmp_path), "--threads", "1"]) == 0
    assert "warning: 1 CPU threads, 2 before the checkpoint" in capsys.readouterr().err
