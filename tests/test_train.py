"""train.py on encoded data, called as its users call it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import choose_preset
from tests.conftest import ROOT, needs

QUICK = ["--batch_size", "64", "--test_batch_size", "100", "--lr", "0.1", "--warmup_steps", "2", "--auc_threshold", "1"]


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def run(capsys, *words):
    status = train.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, json.loads(captured.out.splitlines()[-1]) if captured.out else None, captured.err


def test_one_epoch_by_default(folder, capsys):
    status, result, words = run(capsys, "--dataset", folder, *QUICK)
    assert status == 0 and result["steps"] == 13 and result["ended"] == "all epochs done"
    assert result["test"]["rows"] == 126 and 0 <= result["test"]["auc"] <= 1 and result["test"]["log_loss"] > 0
    assert len(result["validation"]) == 12 and result["validation"][0]["rows"] == 125
    memory, rows = result["memory_bytes"], json.loads((folder / "manifest.json").read_text())["table_sizes"]
    assert memory["tables"] == 4 * 64 * sum(rows) and memory["table_optimizer"] == 0
    assert memory["peak"] > memory["step"] > 4 * 64 * 26 * 64 and memory["mlps"] == 4 * 762_689
    assert "by manifest.json" in words and "device cpu, float32" in words


def test_the_ancestors_command_line(folder, tmp_path, capsys):
    recipe = (
        "--model_config dlrm/config/official_config.json --lr 0.1 --warmup_steps 2750 --decay_end_lr 0 "
        "--decay_steps 27772 --decay_start_step 49315 --batch_size 2048 --epochs 2"
    )
    others = (
        "--test_batch_size 131072 --warmup_factor 0 --decay_power 2 --dataset_type memmap --shuffle_batch_order=False "
        "--nofp16 --loss_scale 1024 --device cpu --seed 1 --print_freq 1 --test_freq 1 --test_after 0.5 "
        "--auc_threshold 0.8025 --nouse_embedding_ext --nosave_model --notest_only --output_dir"
    )
    status, result, words = run(capsys, "--dataset", folder, *recipe.split(), *others.split(), tmp_path)
    assert status == 0 and result["steps"] == 2
    assert "the warm-up of 2750 steps outlasts the run of 2" in words and "never reached in 2 steps" in words


@needs("nvidia.dali")
def test_fused_and_torch_embeddings_and_both_loaders_train_alike(folder, capsys):
    results = [
        run(capsys, "--dataset", folder, *QUICK, *more)[1]["test"]
        for more in ([], ["--loader", "dali"], ["--nouse_embedding_ext"])
    ]
    assert results[0] == results[1]
    assert results[2]["log_loss"] == pytest.approx(results[0]["log_loss"], abs=1e-4)


@pytest.mark.parametrize(("flag", "name"), [("--amp", "bfloat16"), ("--fp16", "float16")])
def test_lower_precision_trains(folder, capsys, flag, name):
    plain = run(capsys, "--dataset", folder, *QUICK)[1]
    status, result, words = run(capsys, "--dataset", folder, *QUICK, flag)
    assert status == 0 and f"device cpu, {name}" in words
    assert ("loss_scale" in result) == (flag == "--fp16")
    assert result["test"]["log_loss"] == pytest.approx(plain["test"]["log_loss"], abs=0.05)


@pytest.mark.parametrize("more", [["--nostochastic_rounding"], ["--table_placement", "host", "--amp"]])
def test_half_precision_tables_train_and_come_back(folder, tmp_path, capsys, more):
    half = ["--embedding_dtype", "bfloat16", *more]
    plain = run(capsys, "--dataset", folder, *QUICK)[1]
    status, result, _ = run(capsys, "--dataset", folder, *QUICK, *half, "--save_model", "--output_dir", tmp_path)
    assert status == 0 and result["test"]["log_loss"] == pytest.approx(plain["test"]["log_loss"], abs=0.05)
    amp = more[2:]
    for dtype in ("float32", "bfloat16"):
        words = ["--test_only", "--ckpt", tmp_path, "--embedding_dtype", dtype, *amp]
        found = run(capsys, "--dataset", folder, *QUICK, *words)[1]["test"]
        if amp and dtype == "float32":  # the fused step of the CPU takes these, and its matrix products are its own
            assert found == pytest.approx(result["test"], abs=0.01)
        else:
            assert found == result["test"]


def test_save_test_only_and_go_on(folder, tmp_path, capsys):
    whole = run(capsys, "--dataset", folder, *QUICK, "--epochs", 2)[1]
    saved = run(capsys, "--dataset", folder, *QUICK, "--save_model", "--output_dir", tmp_path)[1]
    assert saved["checkpoint"] == str(tmp_path / "step_13")
    tested = run(capsys, "--dataset", folder, *QUICK, "--test_only", "--ckpt", saved["checkpoint"])[1]
    assert tested["test"] == saved["test"] and "steps" not in tested
    resumed = run(capsys, "--dataset", folder, *QUICK, "--epochs", 2, "--ckpt", saved["checkpoint"])[1]
    assert resumed["steps"] == 26 and resumed["test"] == whole["test"]
    status, _, words = run(capsys, "--dataset", folder, *QUICK, "--batch_size", 32, "--ckpt", saved["checkpoint"])
    assert status == 1 and "error: --ckpt" in words and "cannot go on" in words


def test_profile(folder, tmp_path, capsys):
    status, result, words = run(capsys, "--dataset", folder, *QUICK, "--profile_steps", 2, "--output_dir", tmp_path)
    assert status == 0 and "aten::mm" in words
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] and result["profile"]


def test_stops_at_the_auc_threshold(folder, capsys):
    status, result, _ = run(capsys, "--dataset", folder, *QUICK, "--auc_threshold", "0.01", "--test_freq", 5)
    assert status == 0 and result["steps"] == 5 and "reached at step 5" in result["ended"]


def small_model(folder, sizes):
    path = folder / "small.json"
    path.write_text(json.dumps({
        "num_numerical_features": 13, "categorical_feature_sizes": sizes, "bottom_mlp_sizes": [8, 4],
        "top_mlp_sizes": [8, 1], "embedding_dim": 4,
    }))  # fmt: skip
    return path


def test_foreign_data_set_takes_its_table_sizes_from_the_configuration(folder, tmp_path, capsys):
    records = np.fromfile(folder / "terabyte_processed_train.bin", np.int32).reshape(-1, 40)
    for name in ("train_data.bin", "test_data.bin"):
        records.tofile(tmp_path / name)
    sizes = (records[:, 14:].max(0) + 1).tolist()
    good = small_model(tmp_path, sizes)
    status, result, words = run(capsys, "--dataset", tmp_path, "--model_config", good, *QUICK)
    assert status == 0 and f"embedding rows by {good}" in words and result["validation"][0]["rows"] == 801
    sizes[6] -= 1
    status, result, words = run(capsys, "--dataset", tmp_path, "--model_config", small_model(tmp_path, sizes), *QUICK)
    assert status == 1 and result is None
    assert f"column C7: expected 0 to {sizes[6] - 1}, got {sizes[6]}" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "/nowhere"], "no data set"),
        (["--dataset", "SET", "--model_config", "unheard_of"], "the ones that come along are"),
        (["--dataset", "SET", "--device", "cuda"], "torch finds no GPU"),
        (["--dataset", "SET", "--amp", "--fp16"], "choose one"),
        (["--dataset", "SET", "--nouse_embedding_ext", "--table_placement", "host"], "only with --use_embedding_ext"),
        (["--dataset", "SET", "--device", "cpu", "--cuda_graphs"], "--cuda_graphs: expected a GPU, got --device cpu"),
        (["--dataset", "SET", "--test_only"], "expected --ckpt DIR"),
        (["--dataset", "SET", "--ckpt", "/nowhere"], "expected a checkpoint, or a run's folder"),
        (["--dataset", "SET", "--decay_steps", "1.5"], "--decay_steps: expected a whole number of steps, got 1.5"),
        (["--dataset", "SET", "--dataset_type", "dist"], "change --dataset_type"),
        (["--dataset", "SET", "--dataset_type", "dle"], "change --dataset_type"),
    ],
)
def test_errors(folder, capsys, words, message):
    if "cuda" in words and train.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, result, said = run(capsys, *(word.replace("SET", str(folder)) for word in words))
    assert status == 1 and result is None and "error: " in said and message in said


def test_flags_from_a_file(tmp_path):
    path = tmp_path / "mine.flags"
    path.write_text("# a comment\n--lr 0.25 --epochs 3   # more\n\n--amp\n--warmup_steps 5\n")
    parse = train.flags.build_parser("").parse_args
    args = parse(["--dataset", "x", f"@{path}", "--warmup_steps", "7"])
    assert (args.lr, args.epochs, args.amp, args.warmup_steps) == (0.25, 3, True, 7)
    args = parse(["--dataset", "x", "@criteo_kaggle"])
    assert args.model_config == "criteo_kaggle_dcnv2" and not args.shuffle_batch_order
    plan = train.options.schedule(args, 1000)
    assert (plan.warmup_steps, plan.decay_start_step, plan.decay_steps, plan.decay_power) == (0, 850, 150, 1)
    assert plan.at(850) == 0.001 and plan.at(925) == 0.0005 and plan.at(1000) == 0
    assert train.options.schedule(args, 20).decay_steps == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'--amp\n--lr "0.1\n', "line 2: No closing quotation: '--lr \"0.1'"),
        (b"@FILE\n", "takes itself in"),
        (b"--lr \xff\xfe\n", "is no text"),
        (b"--lr 1\0\n", "byte 6 is 0"),
        (b"#" * (1 << 20) + b"\n", "got more than 1,048,576 bytes"),
        (b"@FOLDER\n", "Is a directory: expected a file of flags"),
        (b"@FOLDER/none\n", "No such file or directory: expected a file of flags, or one of @criteo_kaggle"),
        (b"@" + b"x" * 5000, "File name too long: expected a file of flags"),
        (b"--lr 1e400\n", "argument --lr: expected a number above 0 and at most 3.4e+38, got '1e400'"),
        (b"--betas 1 0\n", "argument --betas: expected a number of at least 0 and below 1, got '1'"),
    ],
)
def test_files_of_flags_that_cannot_be_read(tmp_path, capsys, text, words):
    path = tmp_path / "mine.flags"
    path.write_bytes(text.replace(b"FILE", str(path).encode()).replace(b"FOLDER", str(tmp_path).encode()))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--dataset", "x", f"@{path}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1


def test_no_validation_split(day_files, tmp_path, capsys):
    encode_days(day_files, tmp_path, Settings(preset=choose_preset("count", last_day="test-all")))
    status, result, words = run(capsys, "--dataset", tmp_path, *QUICK)
    assert status == 0 and "no validation split: tests on the way" in words
    assert result["test"]["rows"] == 251 and result["validation"][-1]["rows"] == 251


@pytest.mark.parametrize(
    "words", [["--batch_size", "0"], ["--fp16=maybe"], ["--epochs", "x"], ["--decay_steps", "-1"], ["@nowhere"], []]
)
def test_flags_that_cannot_be(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, *(["--dataset", "x"] if words else [])])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "expected" in said or "No such file" in said or not words


def test_help_as_a_process():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--decay_start_step" in done.stdout and "DeepSparkHub" in done.stdout


def test_the_tables_have_a_learning_rate_of_their_own(folder, tmp_path, capsys):
    found = {}
    for rate in (1e-30, 10, 20):
        out = tmp_path / str(rate)
        flags = "--batch_size", 2000, "--lr", 0.1, "--warmup_steps", 0, "--embedding_lr", rate  # one step
        assert run(capsys, "--dataset", folder, *flags, "--save_model", "--output_dir", out)[0] == 0
        (step,) = out.glob("step_*")
        tensors = {key: value for path in step.glob("*.safetensors") for key, value in load_file(path).items()}
        found[rate] = [{k: v for k, v in tensors.items() if k.startswith("table") is kind} for kind in (True, False)]
    tables, mlps = zip(*found.values(), strict=True)
    moved = 0
    for name, start in tables[0].items():
        torch.testing.assert_close(tables[2][name] - start, 2 * (tables[1][name] - start), atol=1e-6, rtol=1e-3)
        moved += int((tables[1][name] != start).sum())
    assert moved > 1000
    for name, weights in mlps[0].items():
        assert torch.equal(weights, mlps[1][name]) and torch.equal(weights, mlps[2][name]), name
