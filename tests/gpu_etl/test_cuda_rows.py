"""The functions of rows/scalar.py inside CUDA kernels: run in Numba's simulator, compiled to PTX without a GPU."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

KERNEL = """
import numpy as np
from numba import cuda
from gpu_etl.rows import scalar as rows

def kernel(text, ends, values, missing, faults, table, mask, ids):
    row = cuda.grid(1)
    if row < len(ends):
        begin = 0 if row == 0 else ends[row - 1] + 1
        faults[row] = rows.parse_row(text, begin, ends[row], row, values, missing)
        for c in range(26):
            empty = rows.is_missing(missing[row], 14 + c)
            ids[row, c] = rows.encode_category(table, 0, mask, np.int64(values[row, 14 + c]), empty, False, 0, 0)
"""

SIMULATE = (
    KERNEL
    + """
from tests.reference import parse_row, write_rows
lines = write_rows(seed=1, rows=12).removesuffix(b"\\n").split(b"\\n") + [b"", b"0" + b"\\t" * 39, b"0" + b"\\tz" * 39]
text = np.frombuffer(b"\\n".join(lines), np.uint8).copy()
ends = np.cumsum([len(line) + 1 for line in lines]) - 1
n = len(lines)
values, missing, faults = np.zeros((n, 40), np.uint32), np.zeros(n, np.uint64), np.zeros(n, np.int32)
table, ids = np.zeros(64, np.int64), np.full((n, 26), -1, np.int32)
for i, key in enumerate((0xFFFFFFFF, 0, 0x80000000)):
    slot = rows.find_slot(table, 0, 63, key)
    table[slot] = rows.make_entry(key, i + 2)
cuda.jit(kernel)[2, 8](text, ends, values, missing, faults, table, 63, ids)
for row, line in enumerate(lines):
    expected, fault = parse_row(line)
    assert (faults[row] != 0) == (fault is not None), line
    if not fault:
        assert values[row].tolist() == [(v or 0) % 2**32 for v in expected]
        known = {0xFFFFFFFF: 1, 0: 2, 0x80000000: 3}
        assert ids[row].tolist() == [0 if v is None else known.get(v, 0) for v in expected[14:]]
print("agrees")
"""
)

COMPILE = (
    KERNEL
    + """
import sys
from types import SimpleNamespace
from numba import types
from numba.cuda import api, compiler, dispatcher

capability = tuple(int(number) for number in sys.argv[1].split("."))
for module in (api, compiler, dispatcher):
    if hasattr(module, "get_current_device"):
        module.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
signature = types.void(
    types.uint8[::1], types.int64[::1], types.uint32[:, ::1], types.uint64[::1], types.int32[::1],
    types.int64[::1], types.int64, types.int32[:, ::1],
)
ptx, _ = cuda.compile_ptx(kernel, signature, cc=capability)
assert f".target sm_{capability[0]}{capability[1]}" in ptx, ptx[:400]
print("compiled", len(ptx))
"""
)


def run(code: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_in_the_simulator_agree_with_the_reference():
    assert "agrees" in run(SIMULATE, NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_rows_compile_for_the_gpu(capability):
    assert "compiled" in run(COMPILE, capability)
