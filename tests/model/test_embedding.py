"""The update fused into backward: exact SGD, duplicates included."""

import pytest
import torch

from model.config import ConfigError
from model.layers.embedding import JointEmbedding, TorchEmbedding
from model.layers.optimizers import Optimizer

SIZES = (3, 1, 50)
CASES = {
    "random": lambda: torch.stack([torch.randint(size, (64,)) for size in SIZES], 1).int(),
    "all the same row": lambda: torch.zeros(64, 3, dtype=torch.int32),
    "one row of batch": lambda: torch.tensor([[2, 0, 49]], dtype=torch.int32),
}


@pytest.mark.parametrize("module", [JointEmbedding, TorchEmbedding])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [1, 8, 33])
def test_one_step_is_dense_sgd_in_float64(module, case, dim):
    torch.manual_seed(1)
    embedding = module(SIZES, dim, False)
    embedding.lr.fill_(0.3)
    ids = CASES[case]()
    upstream = torch.randn(len(ids), 3, dim)
    tables = [table.double().clone().requires_grad_() for table in embedding.tables()]
    expected = torch.stack([table[ids[:, t].long()] for t, table in enumerate(tables)], 1)
    vectors = embedding(ids)
    torch.testing.assert_close(vectors.double(), expected.detach(), rtol=0, atol=0)
    (expected * upstream.double()).sum().backward()
    (vectors * upstream).sum().backward()
    assert embedding.weight.grad is None
    for table, before in zip(embedding.tables(), tables, strict=True):
        torch.testing.assert_close(table.double(), before.detach() - 0.3 * before.grad, rtol=1e-5, atol=1e-5)


def test_rows_not_looked_up_stay_as_they_are():
    embedding = JointEmbedding(SIZES, 4, False)
    embedding.lr.fill_(1.0)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([[1, 0, 7]], dtype=torch.int32)).sum().backward()
    changed = (embedding.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 3, 3 + 1 + 7]


def test_evaluation_leaves_the_tables_alone():
    embedding = JointEmbedding(SIZES, 4, False)
    embedding.lr.fill_(1.0)
    before = embedding.weight.detach().clone()
    with torch.no_grad():
        embedding(CASES["random"]())
    assert torch.equal(embedding.weight.detach(), before)


@pytest.mark.parametrize("module", [JointEmbedding, TorchEmbedding])
def test_a_step_can_be_skipped_by_a_scalar(module):
    embedding = module(SIZES, 4, False)
    embedding.lr.fill_(1.0)
    before = embedding.weight.detach().clone()
    index, grad = torch.tensor([0, 5, 5]), torch.ones(3, 4)
    embedding.update(index, grad, skip=torch.tensor(1.0))
    assert torch.equal(embedding.weight.detach(), before)
    embedding.update(index, grad, skip=torch.tensor(0.0))
    assert torch.equal(embedding.weight.detach()[5], before[5] - 2)


def test_step_and_scale_are_numbers_or_scalars_on_the_device():
    embeddings = [JointEmbedding(SIZES, 4, False, Optimizer("adam")) for _ in range(2)]
    embeddings[1].weight.data.copy_(embeddings[0].weight.data)
    step, scale = torch.tensor(0), torch.tensor(1.0)
    embeddings[1].step, embeddings[1].loss_scale = step, scale
    for number in range(1, 4):
        embeddings[0].step, embeddings[0].loss_scale = number, 2.0**number
        step.fill_(number)
        scale.fill_(2.0**number)
        for embedding in embeddings:
            embedding.lr.fill_(0.1)
            (embedding(CASES["one row of batch"]()) * 2.0**number).sum().backward()
    assert torch.equal(embeddings[0].weight, embeddings[1].weight)
    assert [embeddings[0].step, embeddings[0].loss_scale] == [3, 8.0]


@pytest.mark.parametrize("module", [JointEmbedding, TorchEmbedding])
@pytest.mark.parametrize(("column", "value"), [(0, 3), (2, -1), (1, 1), (1, 2**31 - 1)])
def test_an_id_beyond_its_table_is_an_error_and_not_the_neighbours_row(module, column, value):
    ids = torch.zeros(8, 3, dtype=torch.int32)
    ids[5, column] = value
    with pytest.raises(ConfigError, match=f"row 6 of a batch, table {column}: expected an id from 0 to .* got {value}"):
        module(SIZES, 8, False)(ids)
    assert module(SIZES, 8, True)(ids).isfinite().all()
