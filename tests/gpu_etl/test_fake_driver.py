"""The encoder's host code for a GPU on numba-cuda's real host layer and a driver that is not there (fake_driver.py)."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.gpu_etl.test_cuda import CASES

WHOLE = [
    "seeds", "too_many_workers", "kept_rows", "more_rows_than_expected", "a_killed_run_begins_anew", "two_readers",
    "workers", "steady_state", "steady_state_of_kept_rows", "rules",
]  # fmt: skip
SEEDED = ["seeded_stream_handle", "seeded_types", "seeded_streams", "seeded_context", "seeded_pinned"]


def run(case: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_etl.fake", case], cwd=ROOT, env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_on_the_fake_driver(case):
    assert "agrees" in run(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SEEDED)
def test_a_fault_that_is_put_back_is_found(case):
    assert "agrees" in run(case)
