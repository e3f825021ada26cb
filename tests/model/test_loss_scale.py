"""float16's loss scale: a step whose gradients overflow changes nothing, neither MLPs nor tables."""

from itertools import pairwise

import pytest
import torch

from model.checkpoint import files as checkpoint
from model.config import ConfigError
from model.dlrm import DLRM
from model.layers.optimizers import NAMES, Optimizer
from model.training import loss_scale
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import random_batches, small_config

HUGE = 2.0**40  # times any gradient, beyond float16's 65,504


def make_trainer(scale=64.0, dynamic=True, optimizer="sgd", seed=0, fused_embedding=True):
    torch.manual_seed(seed)
    settings = Optimizer(optimizer)
    model = DLRM(small_config(), fused_embedding, settings)
    return Trainer(model, Schedule(0.1), Precision(torch.float16, scale, dynamic), settings)


def everything(trainer):
    """All that a step may change, but for the loss scale."""
    states = trainer.optimizer.state_dict()["state"].values()
    parts = [*trainer.model.parameters(), *trainer.model.embedding.state().values()]
    return [t.clone() for t in parts + [t for state in states for t in state.values() if t is not None]]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", NAMES)
@pytest.mark.parametrize("fused_embedding", [True, False], ids=["fused", "torch"])
def test_overflow_changes_nothing_and_halves_the_scale(optimizer, fused_embedding):
    trainer = make_trainer(optimizer=optimizer, fused_embedding=fused_embedding)
    first, second, third = random_batches(3, 32)
    trainer.step(first)
    before = everything(trainer)
    trainer.loss_scale.scale.fill_(HUGE)
    assert trainer.step(second).isfinite()
    assert same(before, everything(trainer))
    assert trainer.loss_scale.state() == {"scale": HUGE / 2, "good": 0, "skipped": 1}
    trainer.loss_scale.scale.fill_(64.0)
    trainer.step(third)
    after = everything(trainer)
    assert not any(torch.equal(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))
    assert all(part.isfinite().all() for part in after) and trainer.loss_scale.state()["skipped"] == 1


def test_overflow_in_the_bottom_mlp_alone_leaves_the_tables_too():
    trainer = make_trainer(scale=2.0**14)
    (batch,) = random_batches(1, 32)
    before = everything(trainer)
    trainer.step(batch)
    assert not same(before, everything(trainer)) and trainer.loss_scale.skipped == 0
    batch.dense[:, 0] = 60_000.0  # the first layer's gradient is times this
    with torch.no_grad():
        trainer.model.bottom[0].weight[:, 0] = 0.0
    before = everything(trainer)
    trainer.step(batch)
    assert same(before, everything(trainer)) and trainer.loss_scale.skipped == 1


def test_a_static_scale_stays():
    trainer = make_trainer(scale=HUGE, dynamic=False)
    before = everything(trainer)
    for batch in random_batches(3, 32):
        trainer.step(batch)
    assert same(before, everything(trainer))
    assert trainer.loss_scale.state() == {"scale": HUGE, "good": 0, "skipped": 3}


def test_the_scale_finds_its_way_and_grows_again(monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 4)
    trainer, scales = make_trainer(scale=HUGE), []
    for batch in random_batches(60, 32):
        trainer.step(batch)
        scales.append(trainer.loss_scale.scale.item())
    assert scales[0] == HUGE / 2 and min(scales) < 2.0**26
    ratios = {b / a for a, b in pairwise(scales)}
    assert ratios == {0.5, 1.0, 2.0}


def test_training_with_it_is_training_without():
    half = make_trainer()
    torch.manual_seed(0)
    plain = Trainer(DLRM(small_config()), Schedule(0.1))
    for batch in random_batches(40, 64):
        assert half.step(batch).item() == pytest.approx(plain.step(batch).item(), abs=0.01)


def test_checkpoints_hold_it(tmp_path):
    trainer = make_trainer(scale=HUGE)
    for batch in random_batches(5, 32):
        trainer.step(batch)
    checkpoint.save(tmp_path / "ckpt", trainer, {})
    other = make_trainer(seed=1)
    checkpoint.restore(tmp_path / "ckpt", other)
    assert other.loss_scale.state() == trainer.loss_scale.state() == {"scale": HUGE / 32, "good": 0, "skipped": 5}


def test_ranks_share_the_mark_of_a_step_to_skip():
    trainer = make_trainer()
    (batch,) = random_batches(1, 32)

    def exchange(tensors):
        *gradients, found = tensors
        assert all(gradient.isfinite().all() for gradient in gradients) and found == 0
        found.add_(3.0)  # three other ranks have found an overflow

    trainer.exchange = exchange
    before = everything(trainer)
    trainer.step(batch)
    assert same(before, everything(trainer)) and trainer.loss_scale.skipped == 1


def test_an_embedding_that_cannot_hold_its_step_back_is_refused():
    model = DLRM(small_config())
    model.embedding = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="--fp16: Linear cannot hold back a step; expected --amp"):
        Trainer(model, Schedule(0.1), Precision(torch.float16, 64.0))
