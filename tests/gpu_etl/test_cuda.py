"""The GPU's slab functions: in Numba's simulator against the CPU's, compiled for three generations of GPUs, and, where
there is a GPU, on it."""

import json
import os
import subprocess
import sys

import pytest

from gpu_etl.__main__ import main
from gpu_etl.backend.cpu import slab as cpu
from tests.conftest import ROOT

CASES = [
    "parse", "slab_functions", "dictionaries", "finish", "rows_on_the_device", "encode", "memory_limit", "parquet",
    "direct", "many_rows",
]  # fmt: skip

COMPILE = """
import sys
from bench import kernels

capability = tuple(int(number) for number in sys.argv[1].split("."))
every = {kernel.name for kernel in kernels.kernels()}
assert every == set(kernels.ROW_BYTES), every ^ set(kernels.ROW_BYTES)
for name, ptx in kernels.compile_all(capability).items():
    assert f".target sm_{capability[0]}{capability[1]}" in ptx, (name, ptx[:400])
print("compiled", len(every))
"""

WRONG = """
import numpy as np
from numba import cuda
from gpu_etl.backend.cuda.kernel import kernel

@kernel("uint64", "int32[::1]")
def fill(value, array):
    if cuda.grid(1) == 0:
        array[0] = value >> 40

array = cuda.to_device(np.zeros(3, np.int32))
fill.launch(1, 0, 2**63, array)
for wrong in ((-1, array), (2**64, array), (1.0, array), (1, np.zeros(3, np.int32)), (1,),
              (1, cuda.to_device(np.zeros(3, np.int64))), (1, cuda.to_device(np.zeros((3, 3), np.int32)))):
    try:
        fill.launch(1, 0, *wrong)
    except TypeError as error:
        assert "fill" in str(error)
    else:
        raise AssertionError(wrong)
print("agrees")
"""


def run(words: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_in_the_simulator(case):
    words = ["-m", "tests.gpu_etl.simulated", case]
    assert "agrees" in run(words, NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_every_kernel_compiles(capability):
    assert "compiled 30" in run(["-c", COMPILE, capability])


def test_a_launch_takes_the_declared_types_only():
    assert "agrees" in run(["-c", WRONG], NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1")


@pytest.mark.slow
def test_no_kernel_spills_registers_and_the_next_process_compiles_none():
    pytest.importorskip("triton", reason="no ptxas: it comes in triton's wheel")
    found = json.loads(run(["-m", "bench", "kernels"]).splitlines()[-1])
    kernels, seconds = found["kernels"], found["compile_seconds"]
    assert len(kernels) == 30 and seconds["second"] < seconds["first"]  # all compiled, against all read from disk
    for name, found in kernels.items():
        assert found["spill_bytes"] == found["stack_bytes"] == 0 and found["registers"] <= 64, name


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(case):
    if case == "parquet":
        pytest.importorskip("pylibcudf", reason="no cuDF: pip install -r requirements-gpu.txt")
    assert "agrees" in run(["-m", "tests.gpu_etl.simulated", case])


def test_memory_limits_are_for_gpus(day_files, tmp_path, capsys):
    words = ["encode", *map(str, day_files), "--out", str(tmp_path / "set"), "--memory-limit"]
    assert main([*words, "4G"]) == 1
    assert "--memory-limit 4000000000: only with --device cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "much"])
    assert "expected a size like 40G" in capsys.readouterr().err


def test_a_device_without_memory_is_told_and_the_run_can_go_on(day_files, tmp_path, monkeypatch, capsys):
    real, calls = cpu.parse, []

    def parse(text, ends, memory):
        calls.append(text)
        if len(calls) == 3:
            raise RuntimeError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")
        return real(text, ends, memory)

    monkeypatch.setattr(cpu, "parse", parse)
    words = ["encode", *map(str, day_files), "--slab-bytes", "20000", "--out", str(tmp_path / "set")]
    assert main(words) == 1
    assert "its memory does not suffice" in (said := capsys.readouterr().err) and "lower --slab-bytes" in said
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["resumed"]


def test_without_a_gpu_asking_for_one_is_an_error(day_files, tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["encode", *map(str, day_files), "--out", str(tmp_path / "set"), "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "error: --device cuda: " in said and "nvidia-smi" in said
    assert not (tmp_path / "set" / "manifest.json").exists()
