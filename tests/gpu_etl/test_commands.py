"""python -m gpu_etl, as its user calls it."""

import json
import subprocess
import sys

import pytest

from gpu_etl.__main__ import main
from tests.conftest import ROOT


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_synth_encode_verify(tmp_path, capsys):
    days, out = tmp_path / "days", tmp_path / "set"
    assert main(["synth", "--out", str(days), "--rows", "3000", "--seed", "1"]) == 0
    assert last_line(capsys)["test"]["rows"] == 500
    assert main(["encode", *(str(days / f"day_{d}.gz") for d in range(3)), "--out", str(out)]) == 0
    found = last_line(capsys)
    assert found["rows"] == {"train": 2000, "test": 500, "val": 500} and found["rows_per_second"] > 0
    assert main(["verify", str(out)]) == 0
    assert last_line(capsys)["files"] == 4


def test_flags_shape_the_data_set(day_files, tmp_path, capsys):
    words = "--preset mlperf --max-index-range 50 --no-shuffle --seed 3 --threads 1 --slab-bytes 4096 --device cpu"
    assert main(["encode", *map(str, day_files), "--out", str(tmp_path), *words.split()]) == 0
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    preset = settings.pop("preset")
    assert (preset["name"], preset["order"], preset["max_index_range"]) == ("mlperf", "first", 50)
    assert settings == {
        "days": 0, "fractions": [], "shuffle": False, "seed": 3, "format": "records",
        "integers": "unlogged; loaders take log(x + 1)", "bad_rows": "error",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "nowhere/day_0", "--out", "OUT"], "error: nowhere/day_0: expected a day file"),
        (["encode", "DAY", "--out", "OUT"], "error: expected two days or more"),
        (["encode", "DAY", "--days", "7", "--out", "DAY/x"], "error: DAY/x: cannot write there"),
        (["encode", "DAY", "--days", "7", "--preset", "mlperf", "--min-count", "3", "--out", "OUT"], "--preset count"),
        (["verify", "OUT"], "no such file"),
        (["synth", "--out", "OUT", "--days", "1"], "expected 2 days or more"),
        (["synth", "--out", "DAY/x"], "error: DAY/x: Not a directory"),
    ],
)
def test_errors_are_clear_and_exit_is_not_zero(day_files, tmp_path, capsys, words, message):
    def fill(text):
        return text.replace("OUT", str(tmp_path / "out")).replace("DAY", str(day_files[0]))

    assert main([fill(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert fill(message) in captured.err and not captured.out
    assert not (tmp_path / "out").exists()


def test_help_and_errors_as_a_process():
    def run(*words):
        return subprocess.run([sys.executable, "-m", "gpu_etl", *words], cwd=ROOT, capture_output=True, text=True)

    done = run("encode", "--help")
    assert done.returncode == 0 and "--max-index-range" in done.stdout and "manifest.json" in done.stdout
    done = run("verify", "/nowhere")
    assert done.returncode == 1 and "\nerror: /nowhere/manifest.json: no such file" in done.stderr
