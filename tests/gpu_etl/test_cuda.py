"""The GPU's slab functions: in Numba's simulator against the CPU's, compiled for three generations of GPUs, and, where
there is a GPU, on it."""

import os
import subprocess
import sys

import pytest

from gpu_etl.__main__ import main
from tests.conftest import ROOT

CASES = ["parse", "slab_functions", "dictionaries", "finish", "encode"]

# Compiles every kernel of the GPU modules with the types it is launched with.
COMPILE = """
import sys
from types import SimpleNamespace
from numba import cuda, types
from numba.cuda import api, compiler, dispatcher
from gpu_etl import cuda as functions, cuda_dictionary as dictionary

capability = tuple(int(number) for number in sys.argv[1].split("."))
for module in (api, compiler, dispatcher):
    if hasattr(module, "get_current_device"):
        module.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
i4, i8, u4, u8, flag = types.int32[::1], types.int64[::1], types.uint32[::1], types.uint64[::1], types.boolean
one, whole = types.int64, types.uint64
text, values, rows4 = types.uint8[::1], types.uint32[::1, :], types.int32[:, ::1]
kernels = {
    functions._count_newlines: (text, i4), functions._write_newlines: (text, i8, i8),
    functions._parse: (text, i8, values, u8, i4), functions._keep: (values, u8, i8, values, u8),
    functions._count_missing: (u8, i4), functions._integers: (values, u8, one, one),
    functions._count_buckets: (whole, one, one, i8, i4), functions._take_places: (i8, i8),
    functions._scatter: (values, one, i8, types.uint32[:, ::1]),
    functions._finish: (rows4, i8, i8, i4, i8, rows4),
    dictionary._insert: (values, u8, flag, one, i8, i8, i8, types.int64[:, ::1], i4),
    dictionary._number: (types.int64[:, ::1], i4, i8, i8, u4, i8),
    dictionary._code: (values, u8, flag, one, i8, i8, i8, u8, i8, i8, one),
    dictionary._recount: (rows4, i8, u8, i8, i8), dictionary._enter: (u4, i8, i8, i8, i8, i8),
}
every = {k for module in (functions, dictionary) for k in vars(module).values() if hasattr(k, "py_func") and
         type(k).__module__.startswith("numba.cuda")}
assert every == set(kernels), [k.py_func.__name__ for k in every ^ set(kernels)]
for kernel, arguments in kernels.items():
    ptx, _ = cuda.compile_ptx(kernel.py_func, types.void(*arguments), cc=capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx, ptx[:400]
print("compiled", len(kernels))
"""


def run(words: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_in_the_simulator(case):
    words = ["-m", "tests.gpu_etl.simulated", case]
    assert "agrees" in run(words, NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_every_kernel_compiles(capability):
    assert "compiled 15" in run(["-c", COMPILE, capability])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(case):
    assert "agrees" in run(["-m", "tests.gpu_etl.simulated", case])


def test_without_a_gpu_asking_for_one_is_an_error(day_files, tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["encode", *map(str, day_files), "--out", str(tmp_path / "set"), "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "error: --device cuda: " in said and "nvidia-smi" in said
    assert not (tmp_path / "set" / "manifest.json").exists()
