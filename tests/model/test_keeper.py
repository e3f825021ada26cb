"""When checkpoints are written, which stay, and what signals do."""

import json
import os
import signal
import time

import pytest

from model.checkpoint import files as checkpoint, manager as keeper
from model.checkpoint.manager import CheckpointManager, CheckpointOptions
from model.config import ConfigError
from model.metrics import Metrics
from model.training.loop import LoopOptions, fit
from tests.model.helpers import ListLoader, random_batches
from tests.model.test_engine import make_trainer, same, weights


def metrics(auc):
    return Metrics(auc, 0.5, 1.0, 1.0, 100)


def run(tmp_path, tests=(), **options):
    trainer = make_trainer()
    kept = CheckpointManager(CheckpointOptions(tmp_path, **options), trainer, {"place": "here"})
    answers = iter(tests)
    loop = LoopOptions(epochs=2, test_freq=3 if tests else 1000)
    fit(trainer, ListLoader(random_batches(10, 16)), lambda: metrics(next(answers, 0.1)), loop, kept)
    return trainer, kept


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_few_steps_and_the_last_ones_stay(tmp_path):
    trainer, kept = run(tmp_path, every_steps=6, last=2)
    assert names(tmp_path) == ["step_18", "step_20"] and kept.latest == tmp_path / "step_20"
    assert checkpoint.read_state(tmp_path / "step_18").steps == 18
    assert checkpoint.find(tmp_path) == tmp_path / "step_20"
    again = make_trainer(seed=5)
    assert checkpoint.restore(tmp_path / "step_20", again).run["place"] == "here"
    assert same(weights(again), weights(trainer)) and again.steps == 20


def test_written_behind_training_they_are_the_same(tmp_path, monkeypatch):
    run(tmp_path / "a", every_steps=6, last=9, tests=[0.6, 0.7], best=True)
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *words: time.sleep(0.02) or real(*words))
    _, kept = run(tmp_path / "b", every_steps=6, last=9, tests=[0.6, 0.7], best=True, behind=True)
    assert kept.latest == tmp_path / "b" / "step_20" and names(tmp_path / "a") == names(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_what_could_not_be_written_behind_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step_6: could not be written \(.*No space left"):
        run(tmp_path, every_steps=6, behind=True)
    assert names(tmp_path) == []


def test_every_few_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keeper.time, "monotonic", lambda: now.__setitem__(0, now[0] + 10) or now[0])
    run(tmp_path, every_minutes=1.0, last=100)
    steps = [step for step, _ in checkpoint.steps_in(tmp_path)]
    assert len(steps) > 2 and steps[0] > 1 and steps[-1] == 20


def test_nothing_is_written_unasked(tmp_path):
    run(tmp_path)
    assert names(tmp_path) == []


def test_the_best_stays(tmp_path):
    run(tmp_path, tests=[0.6, 0.7, 0.65, 0.69], best=True)
    state = checkpoint.read_state(tmp_path / "best")
    assert names(tmp_path) == ["best"] and state.steps == 6 and state.run["best_auc"] == 0.7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_checkpoint(tmp_path, number):
    trainer = make_trainer()
    kept = CheckpointManager(CheckpointOptions(tmp_path), trainer, {})
    real = trainer.step

    def step(batch):
        if trainer.steps == 6:
            os.kill(os.getpid(), number)
        return real(batch)

    trainer.step = step
    before = signal.getsignal(number)
    progress = fit(trainer, ListLoader(random_batches(10, 16)), lambda: None, LoopOptions(test_freq=1000), kept)
    assert progress.signal == number and progress.ended.endswith("after step 7")
    assert names(tmp_path) == ["step_7"] and signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait(tmp_path):
    trainer = make_trainer()
    kept = CheckpointManager(CheckpointOptions(tmp_path), trainer, {})

    def step(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.step = step
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, ListLoader(random_batches(10, 16)), lambda: None, LoopOptions(), kept)
    assert names(tmp_path) == []


def test_no_checkpoint_of_a_model_whose_loss_was_no_number(tmp_path):
    trainer = make_trainer()
    kept = CheckpointManager(CheckpointOptions(tmp_path, every_steps=4), trainer, {})
    batches = random_batches(10, 16)
    batches[6].dense[3, 2] = float("nan")
    loader = ListLoader(batches)
    loader.ranges = lambda epoch, start: [(16 * i, 16 * i + 16) for i in range(start, 10)]
    words = r"step 7 \(epoch 1, batch 7, rows 97 to 112 of the training split\): the loss is nan.*checkpoint: .*step_4"
    with pytest.raises(ConfigError, match=words):
        fit(trainer, loader, lambda: None, LoopOptions(print_freq=1000, test_freq=1000), kept)
    assert names(tmp_path) == ["step_4"]
    assert json.loads((tmp_path / "step_4" / "state.json").read_text())["steps"] == 4


def test_find_says_what_it_expected(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="expected a checkpoint, or a run's folder"):
        checkpoint.find(tmp_path)
    (tmp_path / "step_9").mkdir()  # without its state: not a checkpoint
    with pytest.raises(checkpoint.CheckpointError, match="no step_N there"):
        checkpoint.find(tmp_path)


def test_a_later_checkpoint_without_its_state_is_not_passed_over(tmp_path):
    run(tmp_path, every_steps=6)
    (tmp_path / "step_20" / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"step_20: damaged \(no state.json in it\); .*step_18"):
        checkpoint.find(tmp_path)
    assert checkpoint.find(tmp_path / "step_18").name == "step_18"
