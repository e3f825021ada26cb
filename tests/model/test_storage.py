"""Tables in half precision: rounding, steps, initial weights, checkpoints; and where tables lie."""

import gc
from types import SimpleNamespace

import pytest
import torch

from model.checkpoint import files as checkpoint
from model.config import ConfigError
from model.dlrm import DLRM
from model.layers import embedding
from model.layers.embedding import JointEmbedding, Storage
from model.layers.optimizers import NAMES, Optimizer, stochastically_rounded
from model.training.loop import LoopOptions, fit
from model.training.schedule import Schedule
from model.training.trainer import Trainer
from tests.model.helpers import SIZES, ListLoader, random_batches, small_config

HALF = (torch.bfloat16, torch.float16)


def neighbours(values, dtype):
    """The largest number of `dtype` that is not above each of the float64 values, and the smallest not below."""
    nearest = values.to(dtype)
    down = torch.where(nearest.double() > values, torch.nextafter(nearest, torch.full_like(nearest, -1e4)), nearest)
    up = torch.where(nearest.double() < values, torch.nextafter(nearest, torch.full_like(nearest, 1e4)), nearest)
    return down, up


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 300.0])  # 1e-5: float16 has fewer digits there
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(dtype, scale):
    torch.manual_seed(0)
    values = (torch.randn(500) * scale).repeat(400, 1)
    found = stochastically_rounded(values, dtype, seed=3)
    assert torch.equal(found, stochastically_rounded(values, dtype, seed=3))
    assert not torch.equal(found, stochastically_rounded(values, dtype, seed=4))
    down, up = neighbours(values[0].double(), dtype)
    assert ((found == down) | (found == up)).all()
    gap = (up.double() - down.double()).clamp(min=1e-300)
    errors = (found.double().mean(0) - values[0].double()) / gap
    assert errors.abs().max() < 5 * 0.5 / 400**0.5 and errors.mean().abs() < 5 * 0.5 / (400 * 500) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_that_fit_stay(dtype):
    values = torch.tensor([0.0, 1.0, -1.5, 2.0**-20, 1024.0, -(2.0**-14)])
    assert torch.equal(stochastically_rounded(values, dtype, 1).float(), values)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_ends_beside_the_exact_one(dtype, name):
    torch.manual_seed(1)
    settings, ids = Optimizer(name), torch.stack([torch.randint(size, (64,)) for size in SIZES], 1).int()
    tables = JointEmbedding(SIZES, 8, False, settings, Storage(dtype))
    tables.lr.fill_(0.3)
    tables.step, tables.loss_scale = 1, 4.0
    exact = tables.weight.detach().double()
    state = {key: value.double() for key, value in settings.table_state(*exact.shape).items()}
    upstream = torch.randn(64, len(SIZES), 8)
    vectors = tables(ids)
    assert vectors.dtype == torch.float32
    (vectors * upstream * 4).sum().backward()
    settings.table_rule()(exact, state, tables.rows(ids), upstream.double().flatten(0, 1), tables.lr.double(), 1)
    down, up = neighbours(exact, dtype)
    found = tables.weight.detach().double()
    slack = 1e-5 * exact.abs().max()  # sums of float32 gradients
    assert ((found >= down.double() - slack) & (found <= up.double() + slack)).all()
    assert tables.weight.dtype == dtype


def test_stochastic_rounding_keeps_changes_that_are_too_small_for_nearest():
    ids, moved = torch.zeros(1, 1, dtype=torch.int32), {}
    for stochastic in (True, False):
        tables = JointEmbedding((1,), 512, False, Optimizer(), Storage(torch.bfloat16, stochastic))
        tables.weight.data.fill_(1.0)
        tables.lr.fill_(1e-4)
        for step in range(1, 101):
            tables.step = step
            tables(ids).sum().backward()
        moved[stochastic] = 1 - tables.weight.detach().double().mean().item()
    assert moved[False] == 0 and moved[True] == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("dtype", HALF)
def test_initial_weights_are_the_same_numbers_rounded(dtype):
    found = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(5)
        found.append(JointEmbedding(SIZES, 8, False, Optimizer(), Storage(kind)).weight.detach())
    assert torch.equal(found[0].to(dtype), found[1])


def trainer(dtype, seed=0):
    torch.manual_seed(seed)
    return Trainer(DLRM(small_config(), True, Optimizer(), Storage(dtype)), Schedule(0.5))


@pytest.mark.parametrize("dtype", HALF)
def test_checkpoints_load_into_tables_of_another_type(tmp_path, dtype):
    half, whole = trainer(dtype), trainer(torch.float32, seed=1)
    checkpoint.save(tmp_path / "half", half, {})
    checkpoint.restore(tmp_path / "half", whole)
    assert torch.equal(whole.model.embedding.weight, half.model.embedding.weight.float())
    fit(whole, ListLoader(random_batches(3, 32)), lambda: None, LoopOptions(test_freq=1000))
    checkpoint.save(tmp_path / "whole", whole, {})
    checkpoint.load(tmp_path / "whole", half.model)
    assert torch.equal(half.model.embedding.weight, whole.model.embedding.weight.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_resumed_run_of_half_tables_ends_with_the_same_bits(tmp_path, dtype):
    loader, options = ListLoader(random_batches(10, 32)), LoopOptions(test_freq=1000)
    whole, first, second = trainer(dtype), trainer(dtype), trainer(dtype, seed=9)
    fit(whole, loader, lambda: None, options)
    for batch in loader.batches():
        first.step(batch)
        if first.steps == 4:
            break
    checkpoint.save(tmp_path / "ckpt", first, {})
    checkpoint.restore(tmp_path / "ckpt", second)
    fit(second, loader, lambda: None, options)
    assert torch.equal(whole.model.embedding.weight, second.model.embedding.weight)


def test_on_the_cpu_host_memory_is_where_tables_lie_anyway():
    torch.manual_seed(0)
    here = JointEmbedding(SIZES, 8, False)
    torch.manual_seed(0)
    host = JointEmbedding(SIZES, 8, False, Optimizer(), Storage(placement="host"))
    assert torch.equal(here.weight, host.weight) and host.weight.device.type == "cpu"


@pytest.mark.parametrize("status", [0, 2])
def test_host_memory_is_pinned_as_long_as_the_module_lives(monkeypatch, status):
    """The calls to CUDA only; that kernels reach the memory is a case of test_kernels.py on a GPU."""
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *words: calls.append(words) or status,
        cudaHostUnregister=lambda *words: calls.append(words),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(embedding, "on_gpu", lambda tensor: True)
    if status:
        with pytest.raises(ConfigError, match=r"6,880 bytes of host memory could not be pinned \(CUDA error 2\)"):
            JointEmbedding(SIZES, 8, False, Optimizer(), Storage(placement="host"))
        return
    module = JointEmbedding(SIZES, 8, False, Optimizer(), Storage(torch.bfloat16, placement="host"))
    address = module.weight.data_ptr()
    assert calls == [(address, sum(SIZES) * 8 * 2, 0)]
    del module
    gc.collect()
    assert calls[1:] == [(address,)]
