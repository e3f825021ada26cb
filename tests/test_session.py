"""The stages of bench/gpu_session.sh: their commands are ones, what is done is not done again, what fails is told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dist_train
from bench import session
from bench.__main__ import build_parser
from bench.same_bytes import differing
from bench.session_steps import STAGES, Session, Step
from gpu_etl.commands import flags as etl_flags
from model.cli import flags as train_flags
from tests.conftest import ROOT, needs

GPU = Session("cuda", 8_000_000, 5.0, Path("/data"), Path("/out"))
CPU = replace(GPU, device="cpu", rows=20_000)


@pytest.mark.parametrize("one", [GPU, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_commands_have_flags_that_are_there(stage, one, monkeypatch):
    steps = STAGES[stage](one)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        words = list(map(str, step.words))
        for start in (["-m", "cProfile", "-o", words[3]], ["-m", "torch.distributed.run", "--standalone", words[3]]):
            words = words[len(start) :] if words[: len(start)] == start else words
        match words:
            case ["-m", "bench", name, *_]:
                build_parser(name).parse_args(words[2:])
            case ["-m", "gpu_etl", *rest]:
                etl_flags.build_parser("").parse_args(rest)
            case ["train.py" | "dist_train.py", *rest]:
                parser = dist_train.build_parser() if words[0] == "dist_train.py" else train_flags.build_parser("")
                assert str(parser.parse_args(rest).device) == one.device
            case _:
                assert words[:2] in (["-m", "pytest"], ["-m", "bench.same_bytes"]), words


def test_training_runs_have_steps_enough_and_not_too_many():
    for rows in (20_000, 1_000_000, 8_000_000, 200_000_000):
        steps = rows * 2 / 3 / replace(GPU, rows=rows).batch_size
        assert 100 < steps < 10_000, rows


def python(code: str) -> tuple[str, str]:
    return "-c", code


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A stage of three steps, of which the second can be told to fail or hang; how often each was started."""
    counts = tmp_path / "counts"
    note = f"open({str(counts)!r}, 'a').write({{!r}} + chr(10))"

    def steps(one):
        second, made = one.out / "second.py", one.data / "made"
        return [
            Step("data", python(f"{note.format('data')}; open({str(made)!r}, 'w').close(); print('{{}}')"), 60, made),
            Step("work", python(f"{note.format('work')}; exec(open({str(second)!r}).read())"), 3),
            Step("last", python(note.format("last") + "; print('words'); print('{\"rate\": 5}')"), 60),
        ]  # fmt: skip

    monkeypatch.setitem(session.STAGES, "small", steps)
    one = Session("cpu", 100, 1.0, tmp_path / "data", tmp_path)
    (tmp_path / "second.py").write_text("print('3 passed')")

    def run(force=False):
        summary = session.run_stage("small", one, force)
        started = counts.read_text().split() if counts.exists() else []
        counts.unlink(missing_ok=True)
        return summary, started

    return one, run


def test_what_is_done_is_not_done_again(small):
    one, run = small
    summary, started = run()
    assert started == ["data", "work", "last"] and not summary["failed"] and not summary["left"]
    results = {name: step["result"] for name, step in summary["steps"].items()}
    assert results == {"data": {}, "work": "3 passed", "last": {"rate": 5}}
    assert json.loads((one.out / "small.json").read_text()) == summary and summary["machine"]["cores"]
    again, started = run()
    assert started == [] and again["steps"] == summary["steps"]
    (one.out / "small" / "last.json").write_text('{"seconds": 3, "res')  # cut off
    assert run()[1] == ["last"]
    (one.data / "made").unlink()  # on a fresh machine: the JSON is there, the data are not
    assert run()[1] == ["data"]
    assert run(force=True)[1] == ["data", "work", "last"]


@pytest.mark.parametrize(
    ("code", "words"),
    [("import sys; print('so far', file=sys.stderr); sys.exit(3)", "exit status 3"),
     ("import time; time.sleep(60)", "not done within 3 s")],
)  # fmt: skip
def test_a_step_that_fails_or_hangs_is_told_and_tried_again(small, capfd, code, words):
    one, run = small
    (one.out / "second.py").write_text(code)
    summary, started = run()
    assert started == ["data", "work", "last"] and summary["failed"] == {"work": words}
    assert f"FAILED: {words}" in capfd.readouterr().out and not (one.out / "small" / "work.json").exists()
    (one.out / "second.py").write_text("print('{}')")
    assert run()[1] == ["work"]


def test_what_does_not_fit_into_the_stage_is_left(small, monkeypatch):
    _, run = small
    monkeypatch.setattr(session, "STAGE_SECONDS", 5)
    summary, started = run()
    assert started == [] and summary["left"] == ["data", "work", "last"]


def shell(folder: Path, *stages: str) -> subprocess.CompletedProcess:
    asked = {"OUT": str(folder / "out"), "DATA": str(folder / "data"), "DEVICE": "cpu", "ROWS": "3000", "FORCE": ""}
    return subprocess.run(
        [str(ROOT / "bench" / "gpu_session.sh"), *stages], cwd=folder, capture_output=True, text=True,
        env=os.environ | asked | {"SECONDS_EACH": "0.1", "PY": sys.executable},
    )  # fmt: skip


@pytest.mark.slow
@needs("polars")
def test_a_stage_by_the_script(tmp_path):
    done = shell(tmp_path, "etl")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert stages == {"etl": {"seconds": stages["etl"]["seconds"], "failed": {}, "left": []}}
    steps = json.loads((tmp_path / "out" / "etl.json").read_text())["steps"]
    assert list(steps) == ["synth", "encode_cpu", "slab", "etl"]
    assert steps["etl"]["result"]["bench"] == "etl" and steps["encode_cpu"]["result"]["rows"]["train"] > 1000
    assert "there already" in shell(tmp_path, "etl").stdout


def test_stages_that_are_none(tmp_path):
    done = shell(tmp_path, "nothing")
    assert done.returncode == 2 and "expected stages out of correct, etl, load, train, profile" in done.stderr


def test_folders_are_compared_by_their_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same").write_bytes(b"1")
        (tmp_path / folder / "other").write_bytes(folder.encode())
    (tmp_path / "a" / "alone").write_bytes(b"")
    assert differing(tmp_path / "a", tmp_path / "b") == ["alone", "other"]
