"""The step, the loop, and going on from a checkpoint."""

import json

import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import files as checkpoint
from model.config import ConfigError
from model.dlrm import DLRM
from model.layers.optimizers import NAMES, Optimizer
from model.training.device import choose_device
from model.training.loop import LoopOptions, fit
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import ListLoader, random_batches, small_config

SCHEDULE = Schedule(lr=0.5, warmup_steps=3, decay_start_step=10, decay_steps=30, decay_end_lr=0.05)


def make_trainer(seed=0, precision=Precision(), fused=True, schedule=SCHEDULE, optimizer="sgd", **changes):  # noqa: B008 - frozen
    torch.manual_seed(seed)
    settings = Optimizer(optimizer)
    return Trainer(DLRM(small_config(**changes), fused, settings), schedule, precision, settings)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_are_plain_sgd_in_float64():
    trainer, batches = make_trainer(), random_batches(12, 32)
    model = make_trainer(fused=False).model.double()
    model.load_state_dict({name: tensor.double() for name, tensor in trainer.model.state_dict().items()})
    model.embedding.weight._post_accumulate_grad_hooks.clear()
    for step, batch in enumerate(batches, 1):
        bottom = model.bottom(batch.dense.double())
        logits = model.top(model.interaction(bottom, model.embedding(batch.sparse))).squeeze(1)
        expected = F.binary_cross_entropy_with_logits(logits, batch.label.double())
        model.zero_grad()
        expected.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                parameter -= SCHEDULE.at(step) * gradient
        assert trainer.step(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor.double(), model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(Precision(torch.bfloat16), 0.05), (Precision(torch.float16, 1024.0), 0.02), (Precision(None, 64.0), 1e-4)],
    ids=str,
)
def test_lower_precision_follows_float32(precision, tolerance):
    plain, lower = make_trainer(), make_trainer(precision=precision)
    for batch in random_batches(20, 64):
        a, b = plain.step(batch).item(), lower.step(batch).item()
        assert b == pytest.approx(a, abs=tolerance)
    assert all(parameter.dtype == torch.float32 for parameter in lower.model.parameters())


def test_training_learns_and_evaluation_changes_nothing():
    trainer, loader = make_trainer(), ListLoader(random_batches(60, 128))
    test = random_batches(4, 256, seed=9)
    before = trainer.evaluate(test, len(test), "test")
    progress = fit(trainer, loader, lambda: trainer.evaluate(test, 4, "test"), LoopOptions(epochs=3, test_freq=50))
    kept = weights(trainer)
    after = trainer.evaluate(test, len(test), "test")
    assert same(kept, weights(trainer))
    assert after.auc > before.auc + 0.05 > 0.55 and after.log_loss < before.log_loss
    assert trainer.steps == 180 and progress.samples == 180 * 128 and progress.samples_per_second > 0
    assert [step for step, _ in progress.tests] == [50, 100, 150]


@pytest.mark.parametrize(("steps_per_epoch", "expected"), [(5, 1), (20, 1), (100, 5)])
def test_twenty_tests_an_epoch_and_never_modulo_zero(steps_per_epoch, expected):
    assert LoopOptions().frequencies(steps_per_epoch)[1] == expected


def test_stops_at_the_threshold_and_not_before_test_after():
    trainer, loader = make_trainer(), ListLoader(random_batches(10, 32))
    metrics = trainer.evaluate(random_batches(1, 500), 1, "test")
    options = LoopOptions(epochs=3, test_freq=4, test_after=1.0, auc_threshold=0.0)
    progress = fit(trainer, loader, lambda: metrics, options)
    assert trainer.steps == 12 and "reached at step 12" in progress.ended and len(progress.tests) == 1


def test_loss_that_is_no_number_is_an_error():
    trainer = make_trainer(schedule=Schedule(lr=1e30))
    with pytest.raises(ConfigError, match=r"step \d+ \(epoch 1, batch \d+\): the loss is nan; lower --lr"):
        fit(trainer, ListLoader(random_batches(30, 32)), lambda: None, LoopOptions(print_freq=1, test_freq=1000))


@pytest.mark.parametrize("stop_after", [1, 7, 10, 13])
@pytest.mark.parametrize("optimizer", NAMES)
def test_resumed_run_ends_with_the_same_bits(tmp_path, stop_after, optimizer):
    loader = ListLoader(random_batches(10, 32))
    options = LoopOptions(epochs=2, test_freq=1000)
    whole = make_trainer(optimizer=optimizer)
    fit(whole, loader, lambda: None, options)

    first = make_trainer(optimizer=optimizer)
    for step in range(stop_after):
        epoch, start = divmod(step, 10)
        first.step(next(iter(loader.batches(epoch, start))))
    checkpoint.save(tmp_path / "ckpt", first, {})
    second = make_trainer(seed=99, optimizer=optimizer)
    checkpoint.restore(tmp_path / "ckpt", second)
    fit(second, loader, lambda: None, options)
    assert second.steps == 20 and same(weights(second), weights(whole))


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    trainer = make_trainer()
    for steps in (1, 2):
        trainer.steps = steps
        checkpoint.save(tmp_path / "ckpt", trainer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert checkpoint.read_state(tmp_path / "ckpt").steps == 2
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == [
        "mlps.safetensors", "optimizer.safetensors", "state.json", "tables.safetensors"
    ]  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: cut(folder / "tables.safetensors"), "damaged"),
        (lambda folder: cut(folder / "mlps.safetensors"), "damaged"),
        (lambda folder: (folder / "tables.safetensors").unlink(), "damaged"),
        (lambda folder: cut(folder / "state.json"), "damaged"),
        (lambda folder: (folder / "state.json").unlink(), "expected a checkpoint that train.py wrote"),
        (lambda folder: (folder / "state.json").write_text(json.dumps({"version": 99})), "expected version 3, got 99"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, words):
    checkpoint.save(tmp_path / "ckpt", make_trainer(), {})
    damage(tmp_path / "ckpt")
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(tmp_path / "ckpt", make_trainer().model)


def test_checkpoint_of_another_model_is_refused_and_nothing_changed(tmp_path):
    checkpoint.save(tmp_path / "ckpt", make_trainer(), {})
    other = make_trainer(categorical_feature_sizes=(3, 11, 201, 1))
    before = weights(other)
    with pytest.raises(checkpoint.CheckpointError, match=r"another model: categorical_feature_sizes .*200.*201"):
        checkpoint.load(tmp_path / "ckpt", other.model)
    assert same(before, weights(other))


def test_a_missing_gpu_is_an_error_not_a_fallback():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        choose_device("cuda")
