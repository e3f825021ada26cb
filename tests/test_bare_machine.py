"""Every command starts on a machine that has only the packages it needs itself, and names those that it lacks."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import BENCHES
from gpu_etl.pipeline import Settings, encode_days
from tests.bare_machine import LACKING
from tests.conftest import ROOT, needs

TINY_MODEL = {
    "num_numerical_features": 13, "categorical_feature_sizes": [50] * 26, "bottom_mlp_sizes": [8],
    "top_mlp_sizes": [8, 1], "embedding_dim": 8,
}  # fmt: skip


def run(*words, status: int = 0) -> tuple[str, str]:
    """stdout and stderr of `python -m MODULE WORDS...` on the bare machine."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bare_machine", *map(str, words)], cwd=ROOT, env=os.environ, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:] + done.stdout[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def test_the_packages_are_not_there_in_processes_started_either():
    found = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    for name in ("isal", "zstandard", "distributed"):
        done = subprocess.run(
            [sys.executable, "-c", found, name], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/bare_site"), str(ROOT)])},
        )  # fmt: skip
        assert done.returncode and f"No module named '{name}'" in done.stderr
    assert len(LACKING) > 15


def test_encode_of_text_and_gzip_gives_the_same_bytes(day_files, folder, tmp_path):
    packed = tmp_path / "day_1.gz"
    packed.write_bytes(gzip.compress(day_files[1].read_bytes()))
    days = [day_files[0], packed, day_files[2]]
    _, said = run("gpu_etl", "encode", *days, "--out", tmp_path / "set")
    lines = [line for line in said.splitlines() if "isal" in line]
    assert len(lines) == 1 and "slower" in lines[0] and "pip install isal==" in lines[0]
    encode_days(days, tmp_path / "here", Settings())
    assert files(tmp_path / "set") == files(tmp_path / "here")  # the manifest has the checksums of the days


def test_synthetic_days_hold_the_same_text(tmp_path):
    for name, words in (("bare", ["-m", "tests.bare_machine", "gpu_etl"]), ("here", ["-m", "gpu_etl"])):
        words += ["synth", "--out", str(tmp_path / name), "--rows", "2000"]
        assert not subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True).returncode
    for day in range(3):
        bare, here = (gzip.decompress((tmp_path / name / f"day_{day}.gz").read_bytes()) for name in ("bare", "here"))
        assert bare == here and bare.count(b"\n") > 600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "error: --device cuda: Numba finds no usable GPU"),
        (["--workers", "2"], "error: --workers, --scheduler: the package distributed is missing: pip install dist"),
        (["--scheduler", "tcp://localhost:1"], "error: --workers, --scheduler: the package distributed is missing"),
    ],
)
def test_encode_says_what_it_lacks(day_files, tmp_path, words, said):
    if words[0] == "--device":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    _, found = run("gpu_etl", "encode", *day_files, "--out", tmp_path / "set", *words, status=1)
    assert said in found and not (tmp_path / "set" / "manifest.json").exists()


@needs("zstandard")
def test_a_zstd_day_names_the_package_before_any_work(day_files, tmp_path):
    import zstandard

    packed = tmp_path / "day_2.zst"
    packed.write_bytes(zstandard.compress(day_files[2].read_bytes()))
    _, said = run("gpu_etl", "encode", day_files[0], packed, "--out", tmp_path / "set", status=1)
    assert f"error: {packed}: the package zstandard is missing: pip install zstandard==" in said
    assert not (tmp_path / "set").exists()


def test_verify_and_inspect(folder, tmp_path):
    assert json.loads(run("gpu_etl", "verify", folder)[0].splitlines()[-1])["command"] == "verify"
    run("gpu_etl", "inspect", folder)
    _, said = run("gpu_etl", "inspect", folder, "--png", tmp_path / "set.png", status=1)
    assert "error: --png: the package matplotlib is missing: pip install matplotlib==" in said


def test_train_with_the_plain_loader(folder, tmp_path):
    words = [
        "train", "--dataset", folder, "--model_config", "criteo_kaggle_tiny", "--batch_size", 400, "--device", "cpu",
        "--lr", "0.01", "--warmup_steps", 1, "--save_model", "--output_dir", tmp_path / "runs",
    ]  # fmt: skip
    out, said = run(*words)
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 3 and result["test"]["rows"] > 100 and "plain loader" in said
    assert "isal is missing: checksums of checkpoints by zlib" in said
    run("train", "--mode", "test", "--ckpt", tmp_path / "runs")
    _, said = run(*words, "--loader", "dali", status=1)
    assert "error: --loader dali: the package nvidia.dali is missing: pip install nvidia-dali-cuda120==" in said
    _, said = run(*words, "--log_dir", tmp_path / "log", status=1)
    assert "the package tensorboard is missing: pip install tensorboard" in said


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_starts(name):
    out, _ = run("bench", name, "--help")
    assert f"python -m bench {name} [-h]" in out and all(other not in LACKING for other in out.split())


def test_benchmarks_are_all_listed():
    out, _ = run("bench", "--help")
    assert all(f"\n    {name}" in out for name in BENCHES)
    _, said = run("bench", "nothing", status=2)
    assert "invalid choice: 'nothing'" in said


@pytest.mark.slow
def test_benchmarks_leave_out_the_peers_that_are_missing(tmp_path):
    model = tmp_path / "model.json"
    model.write_text(json.dumps(TINY_MODEL))
    out, said = run("bench", "etl", "--rows", 3000, "--repeat", 1)
    assert json.loads(out.splitlines()[-1])["times_polars"] is None and "polars is missing" in said
    words = ["--batch_size", 1000, "--repeat", 1, "--seconds", "0.01", "--steps", 2, "--step_batch_size", 64]
    out, said = run("bench", "load", "--rows", 3000, *words, "--model_config", model, "--device", "cpu")
    loaders = json.loads(out.splitlines()[-1])["page_cache"][0]["loaders"]
    assert "CPU loader" in loaders and not any("DALI" in name for name in loaders)
    assert "DALI is missing, so it is left out: pip install nvidia-dali-cuda120==" in said
    _, said = run("bench", "workers", "--rows", 3000, status=1)
    assert "error: bench workers: the package distributed is missing: pip install distributed==" in said
    _, said = run("bench", "train", "--quick", "--plot", tmp_path / "train.png", status=1)
    assert "error: --plot: the package matplotlib is missing" in said


def test_doctor_says_what_installs_the_rest(tmp_path):
    words = ["--only", "machine", "--only", "cpu.checksum", "--only", "cpu.loaders", "--out", tmp_path]
    out, said = run("gpu_etl", "doctor", *words)
    result = json.loads(out.splitlines()[-1])
    assert {one["name"]: one["result"] for one in result["checks"]} == {"cpu.checksum": "PASS", "cpu.loaders": "SKIP"}
    for name in ("isal", "zstandard", "distributed", "DALI", "KvikIO"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        assert "missing  ->  pip install " in line


def test_tests_for_a_gpu_are_collected():
    out, _ = run("pytest", "-m", "gpu", "--collect-only", "-p", "no:hypothesispytest", "-n", "0")
    cases = [line for line in out.splitlines() if "::" in line]
    assert len(cases) > 30 and "error" not in out.splitlines()[-1]
    for name in ("tests/gpu_etl/test_cuda.py", "tests/model/test_kernels.py"):
        assert any(line.startswith(name) for line in cases)
