"""The CPU's fused step held against the eager one, with float64 as the truth for both."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.config import ConfigError
from model.cpu import loops as cpu_kernels, step as cpu_step
from model.cpu.step import CpuStep
from model.dlrm import DLRM
from model.layers.interaction import DotInteraction
from model.layers.optimizers import NAMES, Optimizer
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import Batch, random_batches, small_config

LR = 0.3


def make_model(tables=4, dim=8, seed=0, **changes) -> DLRM:
    sizes = ([3, 11, 200, 1, 1000] * 6)[:tables]
    torch.manual_seed(seed)
    shapes = {"categorical_feature_sizes": tuple(sizes), "embedding_dim": dim, "bottom_mlp_sizes": (16, dim)}
    return DLRM(small_config(**shapes | changes))


def make_batch(model: DLRM, rows: int, equal: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    sizes = model.config.categorical_feature_sizes
    sparse = torch.stack([torch.randint(size, (rows,), generator=generator) for size in sizes], 1).int()
    label = torch.randint(2, (rows,), generator=generator).float()
    return Batch(torch.rand(rows, 13, generator=generator) * 4, sparse * (not equal), label)


def eager(model: DLRM, batch: Batch, autocast=None) -> dict[str, torch.Tensor]:
    """Loss, gradients of the MLPs and tables after the step, by the eager code; float64 for a double model."""
    model.embedding.lr.fill_(LR)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model.top(model.interaction(bottom := model.bottom(batch.dense.to(model.bottom[0].weight.dtype)),
                                             model.embedding(batch.sparse).to(bottom.dtype)))  # fmt: skip
    loss = F.binary_cross_entropy_with_logits(logits.squeeze(1).to(model.bottom[0].weight.dtype), batch.label.to(
        model.bottom[0].weight.dtype))  # fmt: skip
    loss.backward()
    return collect(model, loss)


def fused(model: DLRM, batch: Batch, half: bool) -> dict[str, torch.Tensor]:
    model.embedding.lr.fill_(LR)
    return collect(model, CpuStep(model, half).gradients(batch))


def collect(model, loss) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: p.grad.double().clone() for p in model.dense_parameters()}
    return found | {"loss": loss.detach().double(), "tables": model.embedding.weight.detach().double().clone()}


def errors(model: DLRM, batch: Batch, half: bool) -> dict[str, np.ndarray]:
    """By name: the distance from float64 of the fused step and of the eager one, squared; and the size of it all."""
    truth = eager(copy.deepcopy(model).double(), batch)
    ours = fused(copy.deepcopy(model), batch, half)
    theirs = eager(copy.deepcopy(model), batch, torch.bfloat16 if half else None)
    parts = {name: ((ours[name] - t).norm(), (theirs[name] - t).norm(), t.norm()) for name, t in truth.items()}
    return {name: np.square([part.item() for part in three]) for name, three in parts.items()}


def check(model: DLRM, batch: Batch) -> None:
    """In float32, the fused step is no further from the truth than the eager one is, but for the last bits."""
    for name, (ours, theirs, size) in errors(model, batch, False).items():
        assert ours <= 4 * theirs + 1e-11 * size + 1e-18, name


def check_half(models: list[DLRM], batch: Batch) -> None:
    """In bfloat16 one model's errors may fall either way: those of several, added up."""
    total = {name: 0.0 for name in errors(models[0], batch, True)}
    for model in models:
        for name, found in errors(model, batch, True).items():
            total[name] = total[name] + found
    for name, (ours, theirs, size) in total.items():
        assert ours <= (1e-4 * size if name == "loss" else 2 * theirs + 1e-6 * size), name


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of a few samples, so that a small batch has many."""
    monkeypatch.setattr(cpu_step, "PART", 16)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = [(26, 64), (26, 128), (1, 8), (3, 7), (26, 16), (5, 24)]


@pytest.mark.parametrize(("tables", "dim"), SHAPES)
def test_step_is_the_eager_one(small_parts, tables, dim):
    model = make_model(tables, dim)
    check(model, make_batch(model, 101))


@pytest.mark.parametrize(("tables", "dim"), SHAPES[::3])
def test_step_in_bfloat16_is_as_good_as_the_eager_one(small_parts, tables, dim):
    models = [make_model(tables, dim, seed) for seed in range(6)]
    check_half(models, make_batch(models[0], 101))


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 64, 333])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_rows_on_any_number_of_threads(small_parts, threads, rows, count):
    threads(count)
    model = make_model()
    check(model, make_batch(model, rows))
    assert torch.get_num_threads() == count


@pytest.mark.parametrize("changes", [{"self_interaction": True}, {"hash_indices": True}], ids=str)
def test_all_ids_equal_and_other_models(small_parts, changes):
    models = [make_model(26, 16, seed, **changes) for seed in range(6)]
    batch = make_batch(models[0], 100, equal=True)
    check(models[0], batch)
    check_half(models, batch)


def test_hashed_ids_wrap_around_and_others_are_refused():
    model = make_model(hash_indices=True)
    batch = make_batch(model, 20)
    beyond = batch._replace(sparse=batch.sparse + torch.tensor(model.config.categorical_feature_sizes).int() * 7)
    assert torch.equal(CpuStep(model, False).logits(beyond), CpuStep(model, False).logits(batch))
    model = make_model()
    for wrong in (-4, model.config.categorical_feature_sizes[0], 5000):
        bad = batch._replace(sparse=batch.sparse.clone())
        bad.sparse[7, 0] = wrong
        with pytest.raises(ConfigError, match=f"row 8 of a batch, table 0: expected an id from 0 to .*, got {wrong}"):
            CpuStep(model, False).gradients(bad)


@pytest.mark.parametrize("optimizer", NAMES)
def test_training_follows_the_eager_step(small_parts, optimizer):
    settings = Optimizer(optimizer)
    trainers = []
    for fast in (True, False):
        torch.manual_seed(5)
        model = DLRM(small_config(), True, settings)
        trainers.append(Trainer(model, Schedule(0.02, warmup_steps=5), optimizer=settings, fused=fast))
    fast, plain = trainers
    losses = np.array([[trainer.step(batch).item() for trainer in trainers] for batch in random_batches(60, 101)])
    difference = np.abs(losses[:, 0] - losses[:, 1])
    # Adagrad's first steps have one size whatever the gradient's: last bits of those near 0 become steps apart.
    assert difference[:5].max() < 1e-5 and difference.max() < (0.005 if "adagrad" in optimizer else 1e-4)
    (test,) = random_batches(1, 1500, seed=7)  # enough for the cores to share it
    with torch.no_grad():
        torch.testing.assert_close(fast.logits(test), plain.logits(test), rtol=0, atol=20 * difference.max() + 1e-4)
    assert set(fast.clock.seconds) == {"MLPs", "look-up + interaction", "update of the tables", "update of the MLPs"}


def test_bfloat16_training_ends_where_the_eager_one_does(small_parts):
    losses = []
    for half in (False, True):
        torch.manual_seed(5)
        trainer = Trainer(DLRM(small_config()), Schedule(0.3), Precision(torch.bfloat16), fused=half)
        if half:
            trainer._cpu = CpuStep(trainer.model, half)
        losses.append([trainer.step(batch).item() for batch in random_batches(80, 101)])
    eager_losses, fused_losses = np.array(losses)
    assert np.abs(fused_losses - eager_losses).max() < 0.03
    assert abs(fused_losses[-20:].mean() - eager_losses[-20:].mean()) < 0.003


def test_same_bits_in_every_run_and_scores_do_not_train(small_parts, threads):
    threads(2)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        trainer = Trainer(DLRM(small_config()), Schedule(0.3))
        losses = [trainer.step(batch).item() for batch in random_batches(10, 77)]
        runs.append((losses, trainer.model.embedding.weight.detach().clone()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    with torch.no_grad():
        for rows in (1, 77, 1500):
            (batch,) = random_batches(1, rows)
            torch.testing.assert_close(trainer.logits(batch), trainer.model(batch.dense, batch.sparse))
    assert torch.equal(trainer.model.embedding.weight, runs[1][1])


def test_an_empty_batch_changes_nothing():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (batch,) = random_batches(1, 0)
    trainer = Trainer(model, Schedule(0.5))
    assert trainer.step(batch).isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert trainer.logits(batch).shape == (0,)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_rows_take_their_gradients_in_order_whatever_the_parts(parts):
    generator = np.random.default_rng(3)
    table = generator.standard_normal((200_000, 8), np.float32)
    index, grad = generator.integers(0, 200_000, 5000) % 70_000, generator.standard_normal((5000, 8), np.float32)
    index[::3] = 5
    expected = table.copy()
    for row, slope in zip(index, grad, strict=True):
        expected[row] -= np.float32(0.1) * slope
    whole = table.copy()
    cpu_kernels.sgd(whole, index, grad, np.float32(0.1), 0, 1)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    for part in range(parts):
        cpu_kernels.sgd(table, index, grad, np.float32(0.1), part, parts)
    np.testing.assert_array_equal(table, whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_shows(value):
    model = make_model()
    with torch.no_grad():
        model.bottom[0].weight[0, 0] = value
    assert not torch.isfinite(CpuStep(model, False).gradients(make_batch(model, 40)))


def test_rounding_to_bfloat16_is_that_of_torch():
    """By way of the interaction of one table, one column: the bottom vector, and its product with the table's row."""
    values = torch.cat([torch.randn(1000) * 1e3, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])])
    n = len(values)
    table, bottom, out = values[:, None].contiguous(), *(torch.ones(n, w, dtype=torch.bfloat16) for w in (1, 3))
    bits = (tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (bottom, out))
    loops = cpu_kernels.interaction(1, 1, False)
    loops.forward(table.numpy(), np.arange(n)[:, None], *bits)
    torch.testing.assert_close(out[:, 1], values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert (out[:, 0] == 1).all() and (out[:, 2] == 0).all()


@pytest.mark.parametrize("self_interaction", [False, True])
def test_interaction_loops_are_dot_interaction(self_interaction):
    loops = cpu_kernels.interaction(5, 12, self_interaction)
    table, index = torch.randn(50, 12), torch.randint(50, (9, 5))
    bottom = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    rows = table[index].double().requires_grad_()
    out = DotInteraction(6, 12, self_interaction)(bottom, rows)
    upstream = torch.randn(out.shape)
    (out * upstream).sum().backward()
    bottom32, found = bottom.detach().float().numpy(), np.empty(out.shape, np.float32)
    loops.forward(table.numpy(), index.numpy(), bottom32, found)
    np.testing.assert_allclose(found, out.detach(), rtol=1e-5, atol=1e-5)
    grad_bottom, grad_rows = np.empty((9, 12), np.float32), np.empty((9, 5, 12), np.float32)
    loops.backward(table.numpy(), index.numpy(), bottom32, upstream.numpy(), grad_bottom, grad_rows)
    np.testing.assert_allclose(grad_bottom, bottom.grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_rows, rows.grad, rtol=1e-5, atol=1e-5)


def test_models_it_cannot_do_stay_eager():
    assert CpuStep.takes(make_model())
    assert not CpuStep.takes(make_model(interaction_op="cat"))
    assert not CpuStep.takes(DLRM(small_config(), fused_embedding=False))
    assert not CpuStep.takes(make_model().double())
    half = Trainer(make_model(), Schedule(0.1), Precision(torch.float16, 8.0))
    assert half.matrices == torch.float16
    other = Trainer(make_model(interaction_op="cat"), Schedule(0.1), Precision(torch.bfloat16))
    assert other.matrices == torch.bfloat16


def test_a_thread_of_the_step_works_on_one_core():
    """torch gives a thread the process's number of threads at its first operation, whatever was set before."""

    def work(_: int) -> int:
        torch.ones(200, 200) @ torch.ones(200, 200)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with cpu_step.alone() as cores:
            assert cores == 3 and cpu_step._run(3, work) == [1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_compiled_loops_are_found_on_disk_again():
    """Numba finds a function by what it closes over; another compiled function is another one in every process."""
    loops = cpu_kernels.interaction(5, 12, True)
    for loop in (loops.forward, loops.backward):
        assert all(type(cell.cell_contents) is int for cell in loop.py_func.__closure__)
