"""Table rules held against torch's own optimisers in float64, duplicates and rows not seen included."""

import pytest
import torch
from torch import nn

from model.config import ConfigError
from model.dlrm import DLRM
from model.layers.embedding import JointEmbedding, TorchEmbedding
from model.layers.optimizers import NAMES, Optimizer
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import random_batches, small_config

SIZES, DIM, LR = (3, 1, 40), 5, 0.05


def torch_twin(name, weight):
    """What torch makes of the same name over one dense or sparse float64 weight; row-wise Adagrad by hand."""
    if name == "sgd":
        return torch.optim.SGD([weight], LR)
    if name == "adagrad":
        return torch.optim.Adagrad([weight], LR)
    return torch.optim.SparseAdam([weight], LR)


def rowwise_adagrad(weight, gradient, sums):
    """FBGEMM's EXACT_ROWWISE_ADAGRAD, row by row."""
    for row, grad in enumerate(gradient):
        if grad.any():
            sums[row] += (grad * grad).mean()
            weight.data[row] -= LR * grad / (sums[row].sqrt() + 1e-8)


@pytest.mark.parametrize("module", [JointEmbedding, TorchEmbedding])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_table_rules_are_the_dense_optimisers(module, name, scale):
    torch.manual_seed(0)
    embedding = module(SIZES, DIM, False, Optimizer(name))
    embedding.lr.fill_(LR)
    embedding.loss_scale = scale
    weight = nn.Parameter(embedding.weight.detach().double().clone())
    twin = None if name == "rowwise_adagrad" else torch_twin(name, weight)
    sums = torch.zeros(len(weight), dtype=torch.float64)
    for step in range(1, 7):
        embedding.step = step
        ids = torch.stack([torch.randint(size, (50,)) for size in SIZES], 1).int()
        ids[:, 2] = ids[:, 2].clamp(max=10 * step)  # many duplicates, and rows that come late or never
        upstream = torch.randn(50, 3, DIM)
        rows = (ids.long() + torch.tensor([0, 3, 4])).flatten()
        (embedding(ids) * upstream).sum().mul(scale).backward()
        gradient = torch.zeros_like(weight).index_add_(0, rows, upstream.double().flatten(0, 1))
        if twin is None:
            rowwise_adagrad(weight, gradient, sums)
            continue
        weight.grad = gradient
        if name == "adam":
            seen = rows.unique()
            weight.grad = torch.sparse_coo_tensor(seen[None], gradient[seen], gradient.shape)
        twin.step()
    torch.testing.assert_close(embedding.weight.detach().double(), weight.detach(), rtol=1e-4, atol=2e-5)
    assert embedding.weight.grad is None
    assert all(value.abs().sum() > 0 for value in embedding.state().values())


@pytest.mark.parametrize("name", NAMES)
def test_mlps_and_tables_follow_torch_in_whole_steps(name):
    settings = Optimizer(name)
    torch.manual_seed(3)
    fused = Trainer(DLRM(small_config(), True, settings), Schedule(0.01), optimizer=settings)
    torch.manual_seed(3)
    plain = Trainer(DLRM(small_config(), False, settings), Schedule(0.01), Precision(None, 128.0), settings)
    for batch in random_batches(15, 64):
        assert fused.step(batch).item() == pytest.approx(plain.step(batch).item(), rel=1e-3)
    assert type(fused.optimizer).__name__.lower() == {"rowwise_adagrad": "adagrad"}.get(name, name)


def test_cross_interaction_is_its_formula():
    torch.manual_seed(0)
    model = DLRM(small_config(interaction_op="dcnv2", dcn_num_layers=2, dcn_low_rank_dim=3))
    (batch,) = random_batches(1, 9)
    bottom = model.bottom(batch.dense)
    vectors = model.embedding(batch.sparse)
    first = torch.cat([bottom, vectors.flatten(1)], 1).double()
    x = first
    for down, up in zip(model.interaction.down, model.interaction.up, strict=True):
        x = first * (x @ down.weight.double().T @ up.weight.double().T + up.bias.double()) + x
    torch.testing.assert_close(model.interaction(bottom, vectors).double(), x, rtol=1e-5, atol=1e-5)
    shapes = [tuple(p.shape) for p in model.interaction.parameters()]
    assert shapes == [(3, 40), (3, 40), (40, 3), (40,), (40, 3), (40,)]
    trainer = Trainer(model, Schedule(0.1))
    before = model.interaction.up[0].weight.detach().clone()
    trainer.step(batch)
    assert not torch.equal(before, model.interaction.up[0].weight)
    with pytest.raises(ConfigError, match="dcn_num_layers"):
        small_config(interaction_op="dcnv2", dcn_num_layers=0)


def test_settings_of_adam_are_those_of_torch():
    adam = Optimizer("adam", eps=1e-3, betas=(0.5, 0.6)).for_mlps([nn.Parameter(torch.zeros(2))])
    assert adam.defaults["betas"] == (0.5, 0.6) and adam.defaults["eps"] == 1e-3
    assert Optimizer("adagrad").epsilon == 1e-10 and Optimizer("adam", eps=0.5).epsilon == 0.5
