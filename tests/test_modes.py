"""What can be done with a trained model: predict, inference_benchmark, export; and the logs of a run."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import train
from gpu_etl.load.dataset import open_dataset
from gpu_etl.load.plain import CpuLoader
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw.synthetic import write_days
from gpu_etl.schema import PRESETS
from model import inference
from model.training import run_log as logs
from tests.conftest import ROOT, needs

MODEL = ["--model_config", "criteo_kaggle_tiny"]
QUICK = [*MODEL, "--batch_size", "64", "--lr", "0.05", "--warmup_steps", "2", "--auc_threshold", "1"]


def run(capsys, *words):
    capsys.readouterr()
    status = train.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, json.loads(captured.out.splitlines()[-1]) if captured.out else None, captured.err


@pytest.fixture(scope="module")
def trained(day_files, tmp_path_factory):
    """(data set, run's folder with one checkpoint, its test metrics)."""
    out = tmp_path_factory.mktemp("trained")
    encode_days(day_files, out / "set", Settings())
    assert train.main(["--dataset", str(out / "set"), *QUICK, "--save_model", "--output_dir", str(out / "run")]) == 0
    return out / "set", out / "run"


def split_scores(folder, checkpoint, split):
    """Scores of a split by way of the loader: what predict on raw rows must come to."""
    args = train.flags.build_parser("").parse_args(["--dataset", str(folder), *MODEL])
    session = train.Session(args)
    train.checkpoint.load(train.checkpoint.find(checkpoint), session.trainer.model)
    loader = CpuLoader(open_dataset(folder).splits[split], 1000, torch.device("cpu"))
    (scores,) = [scores for scores, _ in inference.scores(session.trainer, loader.batches())]
    return scores.numpy()


def test_scores_of_a_raw_day_are_those_of_the_encoded_one(trained, day_files, tmp_path, capsys):
    folder, checkpoint = trained
    expected = np.concatenate([split_scores(folder, checkpoint, split) for split in ("test", "val")])
    packed = tmp_path / "day.gz"
    packed.write_bytes(gzip.compress(day_files[2].read_bytes()))
    for source in (day_files[2], packed):
        words = ["--mode", "predict", "--ckpt", checkpoint, "--input", source, "--output", tmp_path / "s.parquet"]
        status, result, _ = run(capsys, "--dataset", folder, *MODEL, *words)
        found = pq.read_table(tmp_path / "s.parquet")
        np.testing.assert_allclose(found["score"], expected, rtol=1e-5)
        labels = [int(line[:1]) for line in day_files[2].read_bytes().splitlines()]
        assert found["label"].to_pylist() == labels
        assert status == 0 and result["rows"] == 251 and 0 < result["auc"] < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day.gz", "s.parquet"]


def test_rows_without_labels_are_scored_too(trained, day_files, tmp_path, capsys):
    folder, checkpoint = trained
    expected = np.concatenate([split_scores(folder, checkpoint, split) for split in ("test", "val")])
    bare = tmp_path / "test.txt"
    bare.write_bytes(b"".join(line.partition(b"\t")[2] for line in day_files[2].read_bytes().splitlines(keepends=True)))
    words = ["--mode", "predict", "--ckpt", checkpoint, "--input", bare, "--output", tmp_path / "s.parquet"]
    status, result, _ = run(capsys, "--dataset", folder, *MODEL, *words)
    found = pq.read_table(tmp_path / "s.parquet")
    assert status == 0 and "auc" not in result and found.column_names == ["score"]
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5)


def test_scores_of_a_data_set_are_those_of_its_test_split(trained, tmp_path, capsys):
    folder, checkpoint = trained
    words = ["--mode", "predict", "--ckpt", checkpoint, "--output", tmp_path / "s.parquet"]
    _, result, _ = run(capsys, "--dataset", folder, *MODEL, *words)
    tested = run(capsys, "--dataset", folder, *MODEL, "--mode", "test", "--ckpt", checkpoint)[1]["test"]
    assert result["auc"] == pytest.approx(tested["auc"], abs=1e-6)
    assert result["log_loss"] == pytest.approx(tested["log_loss"], rel=1e-5) and result["rows"] == 126


@pytest.mark.parametrize("preset", ["torchrec", "dle", "mlperf"])
def test_raw_rows_take_the_presets_rules(day_files, tmp_path, capsys, preset):
    encode_days(day_files, tmp_path / "set", Settings(preset=PRESETS[preset]))
    assert run(capsys, "--dataset", tmp_path / "set", *QUICK, "--save_model", "--output_dir", tmp_path / "run")[0] == 0
    words = ["--mode", "predict", "--ckpt", tmp_path / "run", "--input", day_files[2]]
    assert run(capsys, "--dataset", tmp_path / "set", *MODEL, *words, "--output", tmp_path / "s.parquet")[0] == 0
    order = ("val", "test") if preset == "torchrec" else ("test", "val")
    expected = np.concatenate([split_scores(tmp_path / "set", tmp_path / "run", split) for split in order])
    np.testing.assert_allclose(pq.read_table(tmp_path / "s.parquet")["score"], expected, rtol=1e-5)


def test_the_checkpoint_knows_its_model_and_data_set(trained, day_files, tmp_path, capsys):
    folder, checkpoint = trained
    output = tmp_path / "s.parquet"
    assert run(capsys, "--mode", "predict", "--ckpt", checkpoint, "--input", day_files[2], "--output", output)[0] == 0
    expected = np.concatenate([split_scores(folder, checkpoint, split) for split in ("test", "val")])
    np.testing.assert_allclose(pq.read_table(output)["score"], expected, rtol=1e-5)
    status, result, _ = run(capsys, "--mode", "test", "--ckpt", checkpoint)
    assert status == 0 and result["dataset"] == str(folder)
    encode_days(day_files, tmp_path / "other", Settings(preset=PRESETS["mlperf"]))
    predict = ["--mode", "predict", "--input", tmp_path / "other", "--output", tmp_path / "x.parquet"]
    for words in (["--mode", "test", "--dataset", tmp_path / "other"], predict):
        status, _, said = run(capsys, *words, "--ckpt", checkpoint)
        assert status == 1 and f"{tmp_path / 'other'} is not like {folder}, which the model was trained on" in said
    assert not (tmp_path / "x.parquet").exists()


def test_errors_of_predict_leave_nothing(trained, day_files, tmp_path, capsys):
    folder, checkpoint = trained
    bad = tmp_path / "bad"
    bad.write_bytes(day_files[0].read_bytes() + b"1\t2\n")
    predict = ["--dataset", folder, *MODEL, "--mode", "predict", "--ckpt", checkpoint]
    for words, message in (
        (["--input", bad, "--output", tmp_path / "s.parquet"], "bad: row 501: expected 40 tab-separated fields, got 2"),
        (["--input", day_files[0], "--output", tmp_path / "s.csv"], "expected a name that ends in .parquet"),
        (["--input", tmp_path / "none", "--output", tmp_path / "s.parquet"], "expected a day file"),
        (["--input", day_files[0]], "--mode predict: expected --output FILE"),
    ):
        status, result, said = run(capsys, *predict, *words)
        assert status == 1 and result is None and message in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    status, _, said = run(capsys, "--dataset", folder, *MODEL, "--mode", "export", "--output", "x.pt2")
    assert status == 1 and "--mode export: expected --ckpt DIR" in said


def test_inference_benchmark(trained, capsys):
    folder, checkpoint = trained
    words = ["--mode", "inference_benchmark", "--ckpt", checkpoint, "--inference_benchmark_steps", 5]
    status, result, _ = run(capsys, "--dataset", folder, *MODEL, *words, "--inference_benchmark_batch_sizes", 1, 100)
    assert status == 0 and [found["batch_size"] for found in result["inference"]] == [1, 100]
    for found in result["inference"]:
        assert 0 < found["latency_p50"] <= found["latency_p90"] <= found["latency_p99"]
        assert found["samples_per_second"] == pytest.approx(found["batch_size"] / found["latency_p50"], rel=0.9)


@needs("onnxscript")
def test_exported_models_give_the_same_scores(trained, tmp_path, capsys):
    folder, checkpoint = trained
    expected = split_scores(folder, checkpoint, "test")
    (batch,) = CpuLoader(open_dataset(folder).splits["test"], 1000, torch.device("cpu")).batches()
    for name in ("model.pt2", "model.onnx"):
        words = ["--mode", "export", "--ckpt", checkpoint, "--output", tmp_path / name]
        status, _, said = run(capsys, "--dataset", folder, *MODEL, *words)
        assert status == 0, said
    program = torch.export.load(tmp_path / "model.pt2").module()
    np.testing.assert_allclose(program(batch.dense, batch.sparse).detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(program(batch.dense[:1], batch.sparse[:1]).detach(), expected[:1], rtol=1e-5)
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"dense": batch.dense.numpy(), "sparse": batch.sparse.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    status, _, said = run(capsys, "--dataset", folder, *MODEL, *words[:-1], tmp_path / "model.h5")
    assert status == 1 and "expected a name that ends in .pt2" in said


@needs("tensorboard")
@needs("matplotlib")
def test_logs_of_a_run_and_of_the_one_that_goes_on(trained, tmp_path, capsys):
    folder, _ = trained
    words = ["--dataset", folder, *QUICK, "--test_freq", 5, "--print_freq", 4, "--log_dir", tmp_path / "log"]
    saving = ["--save_model", "--output_dir", tmp_path / "run"]
    _, result, said = run(capsys, *words, *saving)
    events = [json.loads(line) for line in (tmp_path / "log" / logs.LINES).read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [
        ("train", 4), ("val", 5), ("train", 8), ("val", 10), ("train", 12), ("test", 13)
    ]  # fmt: skip
    assert events[1]["auc"] == result["validation"][0]["auc"] and events[-1]["auc"] == result["test"]["auc"]
    assert events[0]["lr"] == 0.05 and 0 < events[0]["loss"] < 2 and events[0]["samples_per_second"] > 0
    assert (tmp_path / "log" / logs.CURVES).read_bytes()[:4] == b"\x89PNG"
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    board = events_of(str(tmp_path / "log")).Reload()
    assert [point.step for point in board.Scalars("val/auc")] == [5, 10]
    assert "test        AUC" in said and "waiting for data" in said
    assert sum(result["time_shares"].values()) == pytest.approx(1, abs=0.01)
    _, result, _ = run(capsys, *words, "--epochs", 2, "--ckpt", tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "log" / logs.LINES).read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "val"] == [5, 10, 15, 20, 25]
    assert result["steps"] == 26


def test_schedule_in_samples(trained, capsys):
    folder, _ = trained
    in_steps = ["--warmup_steps", 4, "--decay_start_step", 6, "--decay_steps", 8, "--decay_end_lr", 0.01]
    in_samples = ["--schedule_unit", "samples", "--warmup_steps", 250, "--decay_start_step", 384, "--decay_steps", 510,
                  "--decay_end_lr", 0.01]  # fmt: skip
    results = [run(capsys, "--dataset", folder, *QUICK, *words)[1]["test"] for words in (in_steps, in_samples)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    """Synthetic days of which a model can reach the AUC that MLPerf asks for."""
    out = tmp_path_factory.mktemp("learnable")
    truth = write_days(out, rows=60_000, days=3, seed=1, compress=False, signal=4.0)
    assert truth["val"]["best_auc"] > 0.87
    encode_days([out / f"day_{day}" for day in range(3)], out / "set", Settings())
    return out / "set"


def compliance(path):
    words = ["-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "0.7.0", str(path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode == 0 and "SUCCESS" in done.stdout + done.stderr


@needs("mlperf_logging")
@pytest.mark.parametrize("threshold", [0.8025, 0.9999])
def test_mlperf_log_passes_the_compliance_checker_where_the_target_was_reached(learnable, tmp_path, capsys, threshold):
    status, result, _ = run(
        capsys, "--dataset", learnable, *MODEL, "--batch_size", 128, "--optimizer", "adam", "--lr", 0.002,
        "--embedding_lr", 0.05, "--embedding_optimizer", "rowwise_adagrad", "--warmup_steps", 10,
        "--auc_threshold", threshold, "--mlperf_log", tmp_path / "log.txt",
    )  # fmt: skip
    lines = [json.loads(line.split(" ", 1)[1]) for line in (tmp_path / "log.txt").read_text().splitlines()]
    keys = [line["key"] for line in lines]
    reached = threshold < 0.9
    assert status == 0 and ("reached" in result["ended"]) == reached
    assert keys[0] == "init_start" and keys.index("init_stop") + 1 == keys.index("run_start") and keys[-1] == "run_stop"
    assert lines[-1]["metadata"]["status"] == ("success" if reached else "aborted")
    accuracies = [line["value"] for line in lines if line["key"] == "eval_accuracy"]
    assert accuracies == [found["auc"] for found in result["validation"]]
    if reached:
        assert compliance(tmp_path / "log.txt")
        spoiled = [line for line in (tmp_path / "log.txt").read_text().splitlines() if '"init_stop"' not in line]
        (tmp_path / "log.txt").write_text("\n".join(spoiled))
        assert not compliance(tmp_path / "log.txt")
