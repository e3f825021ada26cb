"""Runs, folders, models and data sets know whose they are: nothing is mixed, lost, or used with another's ids."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet as pq

import train
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import choose_preset
from model.checkpoint import files as checkpoint
from model.training import run_log as logs
from tests.conftest import ROOT
from tests.test_kill_training import digests

FLAGS = ["--model_config", "criteo_kaggle_tiny", "--test_batch_size", "200", "--lr", "0.01", "--warmup_steps", "5",
         "--auc_threshold", "1", "--test_freq", "1000", "--threads", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


@pytest.fixture(scope="module")
def twin(day_files, tmp_path_factory):
    """The same days, so tables of the same sizes, but ids in another order."""
    out = tmp_path_factory.mktemp("twin")
    encode_days(day_files, out, Settings(preset=choose_preset("count", order="first")))
    return out


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train.main(["--dataset", str(folder), *FLAGS, "--save_model", "--output_dir", str(out)]) == 0
    return out


def run(capsys, *words):
    capsys.readouterr()
    status = train.main([str(word) for word in words])
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1] if captured.out else "null"
    return status, json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")), captured.err


def long_run(folder, out):
    return ["--dataset", folder, *FLAGS, "--batch_size", "32", "--save_freq", "8", "--output_dir", out]


def short_run(folder, out):
    return ["--dataset", folder, *FLAGS, "--batch_size", "200", "--save_model", "--output_dir", out]


def steps(folder):
    return sorted(path.name for path in folder.glob("step_*"))


def test_a_used_output_dir_keeps_both_runs(folder, tmp_path, capsys):
    assert run(capsys, *long_run(folder, tmp_path))[0] == 0
    before = {name: digests(tmp_path / name) for name in steps(tmp_path)}
    assert sorted(before) == ["step_16", "step_24", "step_26"]
    status, result, said = run(capsys, *short_run(folder, tmp_path))
    own = Path(result["checkpoint"])
    assert status == 0 and own.name == "step_5" and own.parent.parent == tmp_path and "writes into" in said
    assert checkpoint.read_state(own).steps == 5
    assert {name: digests(tmp_path / name) for name in steps(tmp_path)} == before
    ids = {checkpoint.read_state(path).run["run"] for path in (tmp_path / "step_26", own)}
    assert len(ids) == 2 and own.parent.name.removeprefix("run_") in ids
    status, _, said = run(capsys, "--dataset", folder, "--mode", "test", "--ckpt", tmp_path)
    assert status == 1 and f"2 runs have checkpoints there; name one of {tmp_path}/step_26, {own}" in said
    assert run(capsys, "--dataset", folder, "--mode", "test", "--ckpt", own.parent)[0] == 0
    more = [*short_run(folder, tmp_path), "--epochs", "2", "--ckpt", own]
    status, result, _ = run(capsys, *more)
    assert status == 0 and result["checkpoint"] == str(own.parent / "step_10")


def test_a_folder_whose_owner_nobody_knows_is_left_alone(folder, tmp_path, capsys):
    assert run(capsys, *long_run(folder, tmp_path))[0] == 0
    (tmp_path / "run.json").unlink()
    before = {name: digests(tmp_path / name) for name in steps(tmp_path)}
    _, result, said = run(capsys, *short_run(folder, tmp_path))
    assert "checkpoints of the run unknown" in said and Path(result["checkpoint"]).parent.parent == tmp_path
    assert {name: digests(tmp_path / name) for name in steps(tmp_path)} == before


def test_a_run_that_asked_for_nothing_claims_nothing(folder, tmp_path, capsys):
    words = ["--dataset", folder, *FLAGS, "--batch_size", "200", "--output_dir", tmp_path / "none"]
    assert run(capsys, *words)[0] == 0 and not (tmp_path / "none").exists()


def test_going_on_from_an_earlier_checkpoint_is_another_run(folder, tmp_path, capsys):
    """Its checkpoints have smaller numbers than those that are there: the last one written once deleted itself."""
    assert run(capsys, *long_run(folder, tmp_path), "--epochs", "2")[0] == 0
    before = {name: digests(tmp_path / name) for name in steps(tmp_path)}
    assert sorted(before) == ["step_40", "step_48", "step_52"]
    status, result, _ = run(
        capsys, *long_run(folder, tmp_path), "--epochs", "2", "--lr", "0.02", "--ckpt", tmp_path / "step_40"
    )
    assert status == 0 and Path(result["checkpoint"]).parent.name.startswith("run_")
    assert {name: digests(tmp_path / name) for name in steps(tmp_path)} == before


def test_keep_one_never_deletes_what_was_written_or_gone_on_from(folder, tmp_path, capsys):
    words = [*long_run(folder, tmp_path), "--keep", "1"]
    assert run(capsys, *words)[0] == 0 and steps(tmp_path) == ["step_26"]
    assert run(capsys, *words, "--epochs", "2", "--ckpt", tmp_path)[0] == 0
    assert steps(tmp_path) == ["step_26", "step_52"]


def test_two_runs_at_once_are_refused(folder, tmp_path, capsys):
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"run abc, process 1 on there\n")
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    status, _, said = run(capsys, *short_run(folder, tmp_path))
    assert status == 1 and "another run is writing there (run abc, process 1 on there); wait for its end" in said
    os.close(descriptor)
    assert run(capsys, *short_run(folder, tmp_path))[0] == 0


def test_where_nothing_can_be_locked_it_is_said(folder, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    status, _, said = run(capsys, *short_run(folder, tmp_path))
    assert status == 0 and "cannot be locked (No locks available): a second run at work there" in said


def test_a_killed_run_holds_no_lock(folder, tmp_path, capsys):
    child = "import os, sys, train\nfrom model.cli import modes\nmodes.fit = lambda *_: os.kill(os.getpid(), 9)\n"
    child += "train.main(sys.argv[1:])"
    words = [str(word) for word in short_run(folder, tmp_path)]
    done = subprocess.run([sys.executable, "-c", child, *words], cwd=ROOT, capture_output=True)
    assert done.returncode == -9 and (tmp_path / "run.json").exists()
    status, result, _ = run(capsys, *short_run(folder, tmp_path))
    assert status == 0 and result["checkpoint"] == str(tmp_path / "step_5")


def test_an_output_dir_that_cannot_be_written_is_found_before_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    status, _, said = run(capsys, *short_run(folder, tmp_path / "file"))
    assert status == 1 and "error: " in said and "train:" not in said and (tmp_path / "file").read_text() == "a file"


def test_logs_belong_to_a_run(folder, tmp_path, capsys):
    words = ["--dataset", folder, *FLAGS, "--batch_size", "200", "--log_dir", tmp_path]
    assert run(capsys, *words)[0] == 0
    first = (tmp_path / logs.LINES).read_bytes()
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / logs.LINES).read_bytes() == first
    (other,) = tmp_path.glob("run_*")
    lines = [logs.read_lines(path / logs.LINES) for path in (tmp_path, other)]
    ids = [{line["run"] for line in some} for some in lines]
    assert [len(some) for some in ids] == [1, 1] and ids[0] != ids[1]
    for path, (run_id,) in zip((tmp_path, other), ids, strict=True):
        assert b"run\0" + run_id.encode() in (path / logs.CURVES).read_bytes()


@pytest.mark.parametrize("torn", [b'{"event": "train", "step": 5, "ti', b"\xff\xfe\n", b"[1]\n", b'{"event": "val"}\n'])
def test_torn_lines_of_a_log_end_no_training(folder, tmp_path, capsys, torn):
    words = [*short_run(folder, tmp_path), "--log_dir", tmp_path]
    assert run(capsys, *words)[0] == 0
    before = len(logs.read_lines(tmp_path / logs.LINES))
    with open(tmp_path / logs.LINES, "ab") as file:
        file.write(torn)
    status, result, _ = run(capsys, *words, "--epochs", "2", "--ckpt", tmp_path)
    assert status == 0 and result["steps"] == 10
    assert len(logs.read_lines(tmp_path / logs.LINES)) > before  # the line after the torn one is whole


def test_a_plot_that_fails_ends_no_training(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "draw_curves", lambda folder, run: 1 / 0)
    status, result, said = run(capsys, *short_run(folder, tmp_path), "--log_dir", tmp_path)
    assert status == 0 and result["test"]["rows"] == 126 and "logs could not be finished: ZeroDivisionError" in said


def test_an_mlperf_log_replaces_no_other_file(folder, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    words = ["--dataset", folder, *FLAGS, "--mlperf_log", tmp_path / "notes"]
    status, _, said = run(capsys, *words)
    assert status == 1 and "is no MLPerf log" in said and (tmp_path / "notes").read_text() == "mine"


@pytest.fixture(scope="module")
def one_class(day_files, tmp_path_factory):
    """A data set whose validation and test rows have label 0 alone."""
    out = tmp_path_factory.mktemp("one")
    last = out / "last"
    last.write_bytes(b"".join(b"0" + line[1:] for line in day_files[2].read_bytes().splitlines(keepends=True)))
    encode_days([*day_files[:2], last], out / "set", Settings())
    return out / "set"


def test_undefined_metrics_are_null_and_save_best_says_so(one_class, tmp_path, capsys):
    words = ["--dataset", one_class, *FLAGS, "--batch_size", "200", "--test_freq", "2", "--log_dir", tmp_path]
    status, result, said = run(capsys, *words, "--save_best", "--output_dir", tmp_path)
    assert status == 0 and result["test"]["auc"] is None and result["validation"][0]["auc"] is None
    assert said.count("--save_best has nothing to go by") == 1
    for line in (tmp_path / logs.LINES).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (tmp_path / logs.CURVES).exists()


def test_other_id_maps_are_refused_everywhere(folder, twin, trained, day_files, tmp_path, capsys):
    sizes = [json.loads((of / "manifest.json").read_text())["table_sizes"] for of in (folder, twin)]
    assert sizes[0] == sizes[1]
    predict = ["--mode", "predict", "--output", tmp_path / "s.parquet"]
    benchmark = ["--mode", "inference_benchmark", "--inference_benchmark_steps", "1"]
    more = [*FLAGS, "--epochs", "2", "--output_dir", tmp_path / "out"]
    for words in (
        ["--mode", "test"], [*predict, "--input", day_files[2]], predict, benchmark, more,
        ["--mode", "export", "--output", tmp_path / "m.pt2"],
    ):  # fmt: skip
        status, _, said = run(capsys, *words, "--ckpt", trained, "--dataset", twin)
        assert status == 1 and "error: --ckpt" in said and not list(tmp_path.iterdir()), said
    status, _, said = run(capsys, *predict, "--input", twin, "--ckpt", trained)
    assert status == 1 and f"{twin} is not like {folder}, which the model was trained on: vocabulary " in said
    expected = [
        json.loads((of / "manifest.json").read_text())["files"]["vocabulary.npz"]["sha256"] for of in (folder, twin)
    ]
    assert f"{expected[0]} there, {expected[1]} here" in said
    status, _, said = run(capsys, "--mode", "test", "--ckpt", trained, "--dataset", twin, "--allow-other-data")
    assert (
        status == 0 and "warning: --ckpt" in said and f": {twin} is not like {folder}" in said and expected[1] in said
    )


def test_another_rule_for_integers_is_refused(day_files, folder, trained, tmp_path, capsys):
    encode_days(day_files, tmp_path, Settings(preset=choose_preset("count", dense="plus2")))
    status, _, said = run(capsys, "--mode", "test", "--ckpt", trained, "--dataset", tmp_path)
    assert status == 1 and "integers clamp there, plus2 here" in said and "vocabulary" not in said


@pytest.mark.parametrize("form", ["records", "dist", "dle"])
def test_going_on_compares_rows_in_every_form(day_files, tmp_path, capsys, form):
    """Other rows under the same ids: the same days, shuffled otherwise."""
    for name, seed in (("a", 0), ("b", 1)):
        encode_days(day_files, tmp_path / name, Settings(form=form, seed=seed))
    out = tmp_path / "out"
    words = [*FLAGS, "--batch_size", "200", "--save_model", "--output_dir", out]
    assert run(capsys, *words, "--dataset", tmp_path / "a")[0] == 0
    again = [*words, "--epochs", "2", "--ckpt", out, "--dataset"]
    status, _, said = run(capsys, *again, tmp_path / "b")
    assert status == 1 and "cannot go on with other data or another order" in said and "sha256 " in said
    status, _, said = run(capsys, *again, tmp_path / "b", "--allow_other_data")
    assert status == 0 and "warning: --ckpt" in said and "sha256 " in said


def test_going_on_sees_bytes_changed_under_the_same_manifest(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "set")
    words = short_run(tmp_path / "set", tmp_path / "out")
    assert run(capsys, *words)[0] == 0
    path = tmp_path / "set" / "terabyte_processed_train.bin"
    records = np.fromfile(path, np.int32).reshape(-1, 40)
    records[:, 0] ^= 1
    records.tofile(path)
    status, _, said = run(capsys, *words, "--epochs", "2", "--ckpt", tmp_path / "out")
    assert status == 1 and "another order: bytes " in said


def foreign(folder, out):
    out.mkdir()
    for split in ("train", "test"):
        shutil.copy(folder / f"terabyte_processed_{split}.bin", out / f"{split}_data.bin")
    return out


def test_what_no_manifest_tells_is_said_and_not_refused(folder, trained, tmp_path, capsys):
    bare = foreign(folder, tmp_path / "bare")
    status, result, said = run(capsys, "--mode", "test", "--ckpt", trained, "--dataset", bare)
    assert (
        status == 0
        and f"{bare}: one of it and {folder} has no manifest: integers, vocabulary cannot be compared" in said
    )
    assert result["test"] == run(capsys, "--mode", "test", "--ckpt", trained)[1]["test"]


@pytest.mark.parametrize("change", ["permuted", "first_id", "bytes", "gone"])
def test_predict_looks_at_the_id_maps(folder, trained, day_files, tmp_path, capsys, change):
    shutil.copytree(folder, tmp_path / "set")
    path = tmp_path / "set" / "vocabulary.npz"
    arrays = dict(np.load(path))
    if change == "permuted":
        np.savez(path, **arrays | {"C3": arrays["C3"][::-1]})
    elif change == "first_id":
        np.savez(path, **arrays | {"first_id": np.array(1_000_000)})
    elif change == "bytes":
        path.write_bytes(b"nothing")
    else:
        path.unlink()
    words = ["--mode", "predict", "--input", day_files[2], "--output", tmp_path / "s.parquet", "--ckpt", trained]
    status, _, said = run(capsys, *words, "--dataset", tmp_path / "set")
    assert status == 1 and "vocabulary.npz: " in said and not (tmp_path / "s.parquet").exists()


def test_predict_replaces_no_raw_day(folder, trained, day_files, tmp_path, capsys):
    day = tmp_path / "day.parquet"
    shutil.copy(day_files[2], day)
    words = ["--ckpt", trained, "--mode", "predict", "--input"]
    status, _, said = run(capsys, *words, day, "--output", day)
    assert status == 1 and "is the --input, which would be replaced" in said
    other = tmp_path / "link.parquet"
    other.symlink_to(day)
    status, _, said = run(capsys, *words, day, "--output", other)
    assert status == 1 and "is the --input" in said
    status, _, said = run(capsys, *words, day_files[2], "--output", day)
    assert status == 1 and "holds no scores; it would be replaced" in said
    assert day.read_bytes() == day_files[2].read_bytes()
    scores = tmp_path / "s.parquet"
    for _ in range(2):  # scores, as this tool writes them, may be replaced
        assert run(capsys, *words, day_files[2], "--output", scores)[0] == 0
    assert pq.read_schema(scores).names == ["score", "label"]


def config(**changes):
    values = json.loads((ROOT / "model/configs/criteo_kaggle_tiny.json").read_text())
    return json.dumps(values | {"categorical_feature_sizes": [41] * 26} | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            config(categorical_feature_sizes=[41] * 25),
            "expected 26 tables, one a category column of the data set, got 25",
        ),
        (
            config(categorical_feature_sizes=[41] * 27),
            "expected 26 tables, one a category column of the data set, got 27",
        ),
        (config(num_numerical_features=12), "num_numerical_features: expected 13, as the data set has, got 12"),
        (config(num_numerical_features="13"), "num_numerical_features: expected a valid integer, got '13'"),
        (config(self_interaction="false"), "self_interaction: expected a valid boolean, got 'false'"),
        (
            config(categorical_feature_sizes=[True] * 26),
            "categorical_feature_sizes.0: expected a valid integer, got True",
        ),
        (config(embeding_dim=16), "embeding_dim: no such key; did you mean embedding_dim?"),
    ],
)
def test_configurations_that_cannot_be(folder, tmp_path, capsys, text, words):
    (tmp_path / "model.json").write_text(text)
    status, result, said = run(capsys, "--dataset", folder, *FLAGS, "--model_config", tmp_path / "model.json")
    assert status == 1 and result is None and words in said and "Traceback" not in said


def test_a_static_loss_scale_that_always_overflows_is_an_error(folder, tmp_path, capsys):
    words = [*short_run(folder, tmp_path), "--fp16", "--nodynamic_loss_scale", "--loss_scale"]
    status, result, said = run(capsys, *words, "1e30")
    assert status == 1 and result is None and "in each of the last 5 steps" in said and "--dynamic_loss_scale" in said
    assert not steps(tmp_path)
    status, result, _ = run(capsys, *words, "64")
    assert status == 0 and result["loss_scale"]["skipped"] == 0
