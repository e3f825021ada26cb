"""The host code of training on a GPU that is not there (stand_in.py): tensors on the right devices, of the types that
the kernels are compiled for, copied from pinned memory, in streams with an order, and no step that waits for the
device. And the stand-in itself: faults put back are found."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="no triton: pip install -r requirements-dev.txt")

CASES = ["steps", "optimizers", "placements", "loaders", "sharding", "benchmarks", "train_py"]


def run(module: str, *cases: str) -> str:
    words = [sys.executable, "-m", f"tests.model.{module}", *cases]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_on_it_has_no_fault(case):
    assert "agrees" in run("stand_in_cases", case)


@pytest.mark.slow
def test_faults_that_are_put_back_are_found():
    run("stand_in_seeds")
