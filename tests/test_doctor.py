"""`python -m gpu_etl doctor`: what it says of a machine, and of checks that pass, fail, crash, hang or are not made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.doctor import checks, doctor, machine, processes, slab, slow, whole
from gpu_etl.doctor.checks import Check
from model.selfcheck import steps
from tests.conftest import ROOT, needs

SIMULATE = """
import sys, warnings
from gpu_etl.backend.cuda import kernel as cuda_kernel

cuda_kernel.THREADS = 8  # a thread of the simulator is one of the operating system
from gpu_etl.backend.cuda import dictionary as cuda_dictionary

cuda_dictionary.HOT, cuda_dictionary.FIRST_SLOTS = 4, 16
warnings.filterwarnings("ignore", "overflow encountered")  # uint64 wraps around, as it should
from gpu_etl.doctor import samples, slab

slab.SEEDS = range(2)
sys.exit(slab.main(sys.argv[1:]))
"""


def examine(*words, path: str = "", status: int = 0) -> tuple[dict, str]:
    """Results and stderr of the command; path: put before the PATH."""
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-m", "gpu_etl", "doctor", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


def test_the_table_and_a_check_that_passes(tmp_path):
    found, said = examine("--only", "machine", "--only", "cpu.checksum", "--out", str(tmp_path))
    assert found["machine"]["torch"].startswith(torch.__version__) and found["machine"]["cores"]
    assert found["machine"][f"disk, {tmp_path}"].startswith("written at") and not list(tmp_path.iterdir())
    assert [(one["name"], one["result"]) for one in found["checks"]] == [("cpu.checksum", "PASS")]
    assert "PASS  cpu.checksum" in said and found["pass"] == 1 and found["failed"] == []


def test_names_that_are_none_and_folders_that_are_not_there(tmp_path):
    assert "--only cpu.no: no such check or group; --list shows them" in examine("--only", "cpu.no", status=1)[1]
    assert "expected a folder, whose disk is measured" in examine("--out", str(tmp_path / "none"), status=1)[1]
    assert examine("--list")[0]["checks"] == [check.name for check in checks.CHECKS]


NVIDIA_SMI = """#!/bin/sh
case "$1" in
--query-gpu*) echo "NVIDIA H200, 143771, 143000, 9.0, 580.65.06" ;;
*) echo "| NVIDIA-SMI 580.65.06      Driver Version: 580.65.06      CUDA Version: 13.0     |" ;;
esac
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_cannot_be_used_is_a_failure_and_none_is_not(tmp_path):
    found, _ = examine("--only", "cuda.parse")
    assert {one["result"] for one in found["checks"]} == {"SKIP"}
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    found, said = examine("--only", "cuda.parse", "--only", "machine", path=str(tmp_path), status=1)
    usable, parse = found["checks"]
    assert usable["result"] == "FAIL" and "--device cuda: " in usable["words"] and found["failed"] == ["cuda.usable"]
    assert (parse["result"], parse["words"]) == ("SKIP", "cuda.usable has not passed")
    assert "python -m gpu_etl.doctor.slab usable cuda" in said  # what says it all
    assert found["machine"]["driver"] == "580.65.06, for CUDA up to 13.0"
    assert found["machine"]["GPU 0"] == "NVIDIA H200, compute capability 9.0, 139.6 of 140.4 GiB free"


def ended(code: str, seconds: float = 60.0) -> doctor.Result:
    return doctor.judge(Check("one", "what is checked", ()), processes.run(["-c", code], seconds))


def test_how_a_check_ends_is_told_in_a_line(tmp_path):
    assert ended("pass").result == "PASS" and ended("pass").words == "what is checked"
    skipped = ended("import sys; print('no DALI', file=sys.stderr); sys.exit(77)")
    assert (skipped.result, skipped.words) == ("SKIP", "no DALI")
    failed = ended("from gpu_etl.doctor.child import outcome\nimport sys\n"
                   "def check():\n    assert False, 'one thing\\n\\nanother'\nsys.exit(outcome(check))")  # fmt: skip
    assert (failed.result, failed.words) == ("FAIL", "error: AssertionError: one thing; another")
    crashed = ended("import os, sys; print('at row 3', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)")
    assert (crashed.result, crashed.words) == ("FAIL", "killed by SIGSEGV after: at row 3")


def test_a_check_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    mark = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(mark)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    found = ended(code, 3.0)
    assert found.result == "FAIL" and "did not end within 3 s" in found.words
    state = Path(f"/proc/{mark.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@needs("triton")
def test_ctrl_c_stops_what_runs(tmp_path):
    """Checks run in sessions of their own, which a terminal's Ctrl-C does not reach."""
    line = [sys.executable, "-m", "gpu_etl", "doctor", "--only", "train.interpreted"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not any(tmp_path.iterdir()):  # a folder for the checks: they start now
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "interrupted" in said
    assert not any(tmp_path.iterdir())


def test_others_go_on_when_one_fails(capfd):
    some = [Check("a", "", ("no_such_module",)), Check("b", "", ("this",)), Check("c", "", ("this",), "a"),
            Check("d", "", ("this",), "b")]  # fmt: skip
    found = doctor.run_all(some, False, 60.0, 2, "/tmp")
    assert [one.result for one in found] == ["FAIL", "PASS", "SKIP", "PASS"]
    assert "No module named no_such_module" in found[0].words and found[2].words
    assert len(capfd.readouterr().err.splitlines()) == 4


def broken(name: str, change) -> SimpleNamespace:
    """The CPU's functions, of which one gives something else."""
    functions = {key: getattr(cpu, key) for key in cpu.__all__}
    return SimpleNamespace(**functions | {name: change(functions[name])})


def one_off(array: np.ndarray) -> np.ndarray:
    if len(array):
        array[len(array) // 2] += 1
    return array


def changed_parse(part):
    def change(real):
        def parse(*words):
            found = list(real(*words))
            one_off(found[part][:, 17] if part == 0 else found[part])
            return tuple(found)

        return parse

    return change


class OtherDictionaries(cpu.Dictionaries):
    def code(self, values, missing, first_row):
        super().code(values, missing, first_row + 1)


class OtherFinisher(cpu.Finisher):
    def finish(self, begin, end, records):
        return lambda: one_off(super(OtherFinisher, self).finish(begin, end, records)())


class OtherOrder(cpu.Finisher):
    def take_shuffled(self, numbered, seed):
        return super().take_shuffled(numbered, seed + (seed == 11))


FAULTS = {
    "values": ("parse", "parse", changed_parse(0)), "missing fields": ("parse", "parse", changed_parse(1)),
    "faults": ("parse", "parse", changed_parse(2)),
    "labels": ("slab", "labels", lambda real: lambda values: one_off(real(values).copy())),
    "summary": ("slab", "summarize", lambda real: lambda *w: real(*w)._replace(smallest=3)),
    "rows kept": ("slab", "keep_rows", lambda real: lambda v, m, keep: real(v, m, np.roll(keep, 1))),
    "integers": ("slab", "integers", lambda real: lambda v, m, shift, empty: real(v, m, shift, empty + 1)),
    "seed of buckets": ("group", "group", lambda real: lambda v, f, s, b, m: real(v, f, s + (s == 9), b, m)),
    "numbers of rows": ("group", "group", lambda real: lambda v, f, s, b, m: real(v, f + (f > 0), s, b, m)),
    "order of one seed": ("finish", "Finisher", lambda real: OtherOrder),
    "shift of a day": ("finish", "Finisher", lambda real: lambda ids, shifts: real(ids, shifts + np.array([0, 0, 1]))),
    "records": ("finish", "Finisher", lambda real: OtherFinisher),
    "first rows": ("dictionaries", "Dictionaries", lambda real: OtherDictionaries),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_slab_function_is_found(fault):
    check, name, change = FAULTS[fault]
    with pytest.raises(AssertionError):
        slab.CHECKS[check](slab.Sides(slow, broken(name, change), 150))


@pytest.mark.parametrize("check", slab.CHECKS)
def test_the_cpu_agrees_with_slow_python(check):
    slab.CHECKS[check](slab.Sides(slow, cpu, 150))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["usable", *slab.CHECKS])
def test_checks_of_the_gpu_run_in_the_simulator(check):
    rows = "9" if check == "dictionaries" else "20"
    done = subprocess.run(
        [sys.executable, "-c", SIMULATE, check, "cuda", "--rows", rows], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("check", ["encode", "meaning", "parquet"])
def test_whole_ways_agree(check, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "SEEDS", {"cpu": range(1)})
    whole.CHECKS[check]("cpu", 200, tmp_path)


def test_other_bytes_of_a_data_set_are_found():
    with pytest.raises(AssertionError, match="seed 2: other bytes in b"):
        whole._equal({"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3"}, "seed 2")
    with pytest.raises(AssertionError, match="files"):
        whole._equal({"a": b"1"}, {"a": b"1", "b": b"3"}, "seed 2")


@pytest.mark.slow
def test_steps_that_differ_are_found(monkeypatch):
    monkeypatch.setattr(steps, "BATCH", {"cpu": 64})
    steps._same(steps.trainer(steps.CPU), steps.trainer(steps.CPU, fused=False), "the same", 1e-3)
    tried = steps.trainer(steps.CPU)
    monkeypatch.setattr(steps, "LR", {"sgd": 0.051})
    with pytest.raises(AssertionError, match="another rate"):
        steps._same(tried, steps.trainer(steps.CPU, fused=False), "another rate", 1e-3)


def test_memory_is_that_of_the_machine():
    found = machine.memory()
    assert 0 < found["available"] <= found["total"] < 1 << 50
