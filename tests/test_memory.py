"""Memory that runs out is a line of words: what needed how much, and what to lower."""

import re
import subprocess
import sys

import pytest
import torch

from gpu_etl.pipeline import Settings, encode_days
from model import memory
from model.config import ConfigError
from model.layers.embedding import JointEmbedding
from model.layers.optimizers import Optimizer
from tests.conftest import ROOT
from tests.model.helpers import small_config

# torch 2.11's words, and those of the runtime, a library and Triton's launcher.
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 20.25 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.20 GiB is "
    "free. Including non-PyTorch memory, this process has 75.90 GiB memory in use."
)  # fmt: skip
OTHERS = (
    "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def flags(folder, out):
    return ["--dataset", str(folder), "--output_dir", str(out), "--batch_size", "32", "--test_batch_size", "200",
            "--model_config", "criteo_kaggle_tiny", "--test_freq", "1000", "--device", "cpu", "--warmup_steps", "5",
            "--embedding_optimizer", "adagrad", "--lr", "0.01", "--auc_threshold", "1"]  # fmt: skip


def test_a_real_allocation_that_fails():
    words = r"out of memory: the tables: 3,200,000.0 GB more were wanted.*; take less"
    with pytest.raises(ConfigError, match=words), memory.explained("the tables", "take less"):
        JointEmbedding((10**14,), 8, False)


def test_what_tables_take():
    config = small_config(categorical_feature_sizes=(10**6, 10**6))
    assert memory.tables(config, Optimizer("adam"), torch.bfloat16) == (
        "2,000,000 embedding rows of 8 take 0.0 GB in bfloat16, and 0.1 GB more for --embedding_optimizer adam"
    )
    config = small_config(categorical_feature_sizes=(10**9,))
    assert memory.tables(config, Optimizer("sgd"), torch.float32) == (
        "1,000,000,000 embedding rows of 8 take 32.0 GB in float32"
    )


def test_tables_that_cannot_fit_are_refused_before_they_are_made(monkeypatch, tmp_path):
    config, cpu = small_config(categorical_feature_sizes=(10**9,)), torch.device("cpu")
    refused = r"take 32\.0 GB in float32; 10\.0 GB are free on the device cpu; take "
    for free, words in ((10**11, None), (10**10, refused)):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        if words:
            with pytest.raises(ConfigError, match=words):
                memory.check_tables(config, Optimizer("sgd"), torch.float32, cpu)
        else:
            memory.check_tables(config, Optimizer("sgd"), torch.float32, cpu)


def test_a_container_may_have_less_than_the_machine(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available(cpu) > 10**8
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(cpu) > 10**8
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available(cpu) == 2000


@pytest.mark.parametrize("words", OTHERS)
def test_other_signs_of_it_are_known(words):
    found = f"out of memory: a step: {re.escape(words)}.*; lower it"
    with pytest.raises(ConfigError, match=found), memory.explained("a step", "lower it"):
        raise RuntimeError(words)


def test_other_errors_pass():
    for error in (RuntimeError("expected scalar type Half"), ConfigError("no"), KeyError("x")):
        with pytest.raises(type(error), match=str(error)), memory.explained("a step", "lower it"):
            raise error


CHILD = """
import sys, torch, train
from model.training import trainer
from model.layers.embedding import _Tables

def no_memory(*_):
    raise torch.OutOfMemoryError(sys.argv[2])

place, owner = {"step": ("step", trainer.Trainer), "test": ("evaluate", trainer.Trainer), "tables": ("_draw", _Tables)}[
    sys.argv[1]
]
setattr(owner, place, no_memory)
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("step", "training on batches of 32 rows: 20.25 GiB more were wanted; lower --batch_size"),
        ("test", "test on batches of 200 rows: 20.25 GiB more were wanted; lower --test_batch_size"),
        (
            "tables",
            r"[\d,]+ embedding rows of 16 take 0.0 GB in float32, and 0.0 GB more for --embedding_optimizer adagrad: "
            r"20.25 GiB more were wanted; take --embedding_dtype bfloat16 \(half of it\), --table_placement host",
        ),
    ],
)
def test_train_ends_with_words(folder, tmp_path, place, what):
    words = [sys.executable, "-c", CHILD, place, ON_A_GPU, *flags(folder, tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert re.search(f"error: out of memory: {what}", done.stderr), done.stderr
