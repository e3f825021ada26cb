"""dist_train.py does what train.py does, on any number of ranks, and their checkpoints are interchangeable."""

import json

import pytest
import torch

import dist_train
import train
from gpu_etl.pipeline import Settings, encode_days
from model.training.schedule import Schedule
from tests.conftest import needs
from tests.ranks import run_main

# Three validation tests, two epochs with a tail of 33 rows; the plan has every kind of placement.
FLAGS = ["--batch_size", "64", "--test_batch_size", "50", "--lr", "0.004", "--warmup_steps", "2",
         "--epochs", "2", "--test_freq", "9", "--model_config", "criteo_kaggle_tiny", "--print_freq", "1",
         "--threads", "1", "--save_model", "--optimizer", "adagrad", "--auc_threshold", "1"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def flags(folder, out, *more):
    return ["--dataset", folder, "--output_dir", out, "--log_dir", out, *FLAGS, *more]


def alone(folder, out, *more):
    assert train.main([str(word) for word in flags(folder, out, *more)]) == 0
    return curve(out)


def curve(out):
    """Steps' losses, and the tests' metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "train"}
    tests = [(line["event"], line["step"], line["auc"], line["log_loss"], line["calibration"], line["rows"])
             for line in lines if line["event"] in ("val", "test")]  # fmt: skip
    return losses, tests


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5) and len(found[0]) == len(expected[0])
    assert len(found[1]) == len(expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours[:2] == theirs[:2] and ours[2:] == pytest.approx(theirs[2:], abs=1e-4)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return alone(folder, out), out / "step_26"


def good(ends):
    assert [end.status for end in ends] == [0] * len(ends), ends
    assert all(not end.out and not end.err for end in ends[1:])
    return json.loads(ends[0].out.splitlines()[-1])


def tensors(checkpoint):
    """All tables and their optimiser's memory, whatever files they are in."""
    state = train.checkpoint.read_state(checkpoint)
    config, adagrad = state.model, train.Optimizer("adagrad")
    trainer = train.Trainer(train.DLRM(config, True, adagrad), Schedule(1.0), optimizer=adagrad)
    train.checkpoint.restore(checkpoint, trainer)
    return [trainer.model.embedding.weight.detach(), *trainer.model.embedding.state().values(),
            *(p.detach() for p in trainer.model.dense_parameters()),
            *(value for state in trainer.optimizer.state.values() for value in state.values())]  # fmt: skip


def close(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def mixed_plan(config_sizes, world, dim=16):
    """Tables 0, 4, ...: replicated; 1, 5, ...: whole; 2, 6, ...: by rows; 3, 7, ...: by columns."""
    tables = []
    for t, rows in enumerate(config_sizes):
        at = [rows * r // world for r in range(world + 1)]
        left = [dim * r // world for r in range(world + 1)]
        pieces = {
            1: [(t % world, 0, rows, 0, dim)],
            2: [(r, at[r], at[r + 1], 0, dim) for r in range(world) if at[r] < at[r + 1]],
            3: [(r, 0, rows, left[r], left[r + 1]) for r in range(world)],
        }.get(t % 4)
        placed = {"replicated": True} if pieces is None else {
            "pieces": [{"rank": r, "rows": [a, b], "columns": [c, d]} for r, a, b, c, d in pieces]
        }  # fmt: skip
        tables.append({"table": t, "rows": rows, **placed})
    return {"version": 1, "world": world, "dim": dim, "tables": tables}


THE_OTHER_WAY = pytest.param(2, ["--nouse_embedding_ext", "--loader", "dali"], marks=needs("nvidia.dali"))


@pytest.mark.parametrize(("world", "others"), [(1, []), (3, []), THE_OTHER_WAY])
def test_same_curve_metrics_and_weights(folder, tmp_path, whole, world, others):
    sizes = json.loads((folder / "manifest.json").read_text())["table_sizes"]
    (tmp_path / "plan.json").write_text(json.dumps(mixed_plan(sizes, world)))
    more = ["--plan", tmp_path / "plan.json", "--save_plan", tmp_path / "again.json"]
    result = good(run_main(world, flags(folder, tmp_path, *more, *others, "--cache_eval_data"), tmp_path))
    assert result["steps"] == 26 and result["world"] == world and result["command"] == "dist_train"
    same(curve(tmp_path), whole[0])
    close(tmp_path / "step_26", whole[1])
    assert json.loads((tmp_path / "again.json").read_text()) == mixed_plan(sizes, world)


@pytest.mark.slow
def test_checkpoints_move_between_numbers_of_ranks_and_train(folder, tmp_path, whole):
    """One epoch on two ranks, then on three, on train.py, and from train.py back to two."""
    half = [*flags(folder, tmp_path / "two"), "--epochs", "1"]
    (tmp_path / "two").mkdir()
    good(run_main(2, half, tmp_path / "two"))
    first = tmp_path / "two" / "step_13"
    stored = sum(p.stat().st_size for p in first.iterdir() if p.suffix == ".safetensors")
    mine = sum(p.stat().st_size for p in whole[1].iterdir() if p.suffix == ".safetensors")
    assert stored < mine + 20_000  # the model once, and names
    (tmp_path / "three").mkdir()
    good(run_main(3, flags(folder, tmp_path / "three", "--ckpt", first), tmp_path / "three"))
    close(tmp_path / "three" / "step_26", whole[1])
    alone(folder, tmp_path / "one", "--ckpt", first)
    close(tmp_path / "one" / "step_26", whole[1])
    alone(folder, tmp_path / "half", "--epochs", "1")
    (tmp_path / "back").mkdir()
    good(run_main(2, flags(folder, tmp_path / "back", "--ckpt", tmp_path / "half"), tmp_path / "back"))
    close(tmp_path / "back" / "step_26", whole[1])


def test_test_only_and_the_split_form(folder, day_files, tmp_path, whole):
    encode_days(day_files, tmp_path / "dist", Settings(form="dist"))
    words = ["--dataset", tmp_path / "dist", "--dataset_type", "dist", "--test_only", "--ckpt", whole[1],
             "--backend", "gloo", "--device", "cpu", "--test_batch_size", "77"]  # fmt: skip
    found = good(run_main(2, words, tmp_path))["test"]
    expected = whole[0][1][-1]
    assert found["auc"] == expected[2] and found["log_loss"] == pytest.approx(expected[3], abs=1e-7)


def test_the_same_command_starts_and_goes_on(folder, tmp_path, whole):
    words = flags(folder, tmp_path, "--ckpt", "auto", "--save_freq", "5", "--save_behind")
    assert good(run_main(2, [*words, "--epochs", "1"], tmp_path))["steps"] == 13
    ends = run_main(2, words, tmp_path)
    assert good(ends)["steps"] == 26 and f"going on from {tmp_path}/step_13, step 13" in ends[0].err
    close(tmp_path / "step_26", whole[1])
    assert len(list(tmp_path.glob("step_*"))) == 4  # the last three, and the one it went on from


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "0.00001"], "the model does not fit: 0.0 GB on 2 ranks of 0.0 GB, 0.0 GB short; what would help"),
        (["--backend", "nccl"], "--backend nccl: works on GPUs only"),
        (["--mode", "predict", "--ckpt", "x", "--output", "y"], "works in one process; use train.py"),
        (["--plan", "/nowhere.json"], "/nowhere.json: No such file"),
    ],
)
def test_errors_are_said_once_and_end_all_ranks(folder, tmp_path, words, message):
    ends = run_main(2, flags(folder, tmp_path, *words), tmp_path)
    assert [end.status for end in ends] == [1, 1]
    said = "".join(end.err for end in ends)
    assert said.count(message) == 1 and said.count("error: ") == 1 and "Traceback" not in said


def test_help_tells_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        dist_train.main(["--help"])
    assert stopped.value.code == 0 and "--cache_eval_data" in capsys.readouterr().out
