"""The step's GPU kernels: in Triton's interpreter against the eager code and float64, compiled for three generations of
GPUs with what they may use of each, and, where there is a GPU, on it at real sizes."""

import os
import subprocess
import sys

import pytest
import torch

from model.kernels.cost import H200, Shape
from tests.conftest import ROOT

pytest.importorskip("triton", reason="no triton: pip install -r requirements-dev.txt")
from bench import step_kernels

CASES = ["forward_and_backward", "updates", "rounding", "records", "staging", "steps", "refusals", "benchmark"]
STEP_CASES = ["spoilt_gradients", "flags", "look_ups_are_sorted_once", "one_rank", "replicas"]
GPU_CASES = ["graph", "real_sizes"]
# tables, dim, matrices, tables' type, rule -> most registers a thread and bytes of shared memory, by kernel
LIMITS = {
    (26, 128, "bfloat16", "float32", "sgd"): {
        "forward": (56, 12_000), "backward": (72, 12_000), "step_pieces": (160, 12_000), "step_spanning": (96, 8_192),
        "find_rows": (40, 0), "fetch": (32, 0), "unpack": (64, 4_096),
    },
    (26, 64, "float16", "bfloat16", "rowwise_adagrad"): {
        "forward": (64, 12_000), "backward": (64, 12_000), "step_pieces": (184, 20_000), "step_spanning": (96, 8_192),
    },
    (64, 512, "bfloat16", "float32", "adam"): {
        "forward": (128, 40_000), "backward": (128, 50_000), "step_pieces": (128, 40_000),
    },
    (26, 128, "float32", "float32", "sgd"): {"forward": (255, 40_000), "backward": (255, 40_000)},
}  # fmt: skip
CAPABILITIES = {model: ["9.0"] for model in LIMITS} | {next(iter(LIMITS)): ["8.0", "9.0", "10.0"]}


def run(case: str, module: str = "kernel_cases", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.model.{module}", case], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ANYWHERE = [("kernel_cases", case) for case in CASES] + [("kernel_cases_step", case) for case in STEP_CASES]


@pytest.mark.parametrize(("module", "case"), ANYWHERE)
def test_in_the_interpreter(module, case):
    assert "agrees" in run(case, module, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "case"), ANYWHERE + [("kernel_cases_gpu", c) for c in GPU_CASES])
def test_on_the_gpu(module, case):
    assert "agrees" in run(case, module)


@pytest.mark.parametrize(("model", "capability"), [(m, c) for m in LIMITS for c in CAPABILITIES[m]], ids=str)
def test_machine_code_keeps_its_limits(model, capability):
    variants = step_kernels.variants(*model)
    for name, (registers, shared) in LIMITS[model].items():
        found = step_kernels.compiled(variants[name], capability)
        assert found["stack_bytes"] == 0, (name, found)
        assert found["registers"] <= registers and found["shared_bytes"] <= shared, (name, found)


def test_least_bytes_are_those_of_the_tensors():
    shape = Shape(batch=6, tables=26, dim=128, distinct=50, weight=4, matrix=2)
    costs = step_kernels.costs(shape, "rowwise_adagrad")
    weight, bottom = torch.empty(50, 128), torch.empty(6, 128, dtype=torch.bfloat16)
    vectors, out = torch.empty(6 * 26, 128), torch.empty(6, 128 + 27 * 26 // 2 + 1, dtype=torch.bfloat16)
    ids, grads = torch.empty(6, 26, dtype=torch.int32), torch.empty(6 * 26, 128, dtype=torch.bfloat16)
    assert costs["find_rows"].bytes == 2 * ids.nbytes
    assert costs["forward"].bytes == ids.nbytes + vectors.nbytes + bottom.nbytes + out.nbytes
    assert costs["backward"].bytes == ids.nbytes + vectors.nbytes + 2 * bottom.nbytes + out.nbytes + grads.nbytes
    assert costs["unpack"].bytes == 6 * 160 + 6 * (13 + 26 + 1) * 4
    assert costs["step"].bytes >= grads.nbytes + 2 * weight.nbytes
    both = costs["forward"] + costs["backward"]
    assert both.seconds(H200, "bfloat16") == pytest.approx(both.bytes / 4.3e12)  # bytes, not operations, are the limit
