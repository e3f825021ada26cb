"""The step at fixed addresses, and its CUDA graph, held against the direct one."""

import pytest
import torch

from model.config import ConfigError
from model.dlrm import DLRM
from model.layers.optimizers import Optimizer
from model.training.cuda_graph import MOST_SIZES, SLOTS, Static, StaticInputs
from model.training.loop import LoopOptions, fit
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import Batch, ListLoader, random_batches, small_config

CPU = torch.device("cpu")
SCHEDULE = Schedule(0.2, warmup_steps=4, decay_start_step=8, decay_steps=20)


def make_trainer(device=CPU, precision=Precision(), optimizer="sgd", fused=False):  # noqa: B008 - frozen
    torch.manual_seed(0)
    settings = Optimizer(optimizer)
    with device:
        model = DLRM(small_config(), True, Optimizer())
    return Trainer(model.to(device), SCHEDULE, precision, settings, fused=fused)


def with_tails(count: int, rows: int) -> list[Batch]:
    """Full batches, with a short one after every fifth."""
    batches = random_batches(count, rows)
    return [Batch(*(t[: rows // 3] for t in batch)) if i % 6 == 5 else batch for i, batch in enumerate(batches)]


def same_weights(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("precision", [Precision(), Precision(torch.float16, 2.0**40, True)], ids=str)
def test_steps_at_fixed_addresses_are_the_direct_ones(precision, fused):
    direct, static = make_trainer(precision=precision, fused=fused), make_trainer(precision=precision, fused=fused)
    static.run = Static(static.run, CPU)
    for batch in with_tails(20, 48):
        assert torch.equal(direct.step(batch), static.step(batch))
    assert same_weights(direct, static)


def test_slots_are_filled_in_turns_and_batches_stay_free():
    first, second, third = random_batches(3, 10)
    inputs = StaticInputs(first, CPU)
    places = [[t.data_ptr() for t in slot] for slot in inputs.slots]
    used = []
    for batch in (first, second, third):
        slot = inputs.put(batch)
        used.append(slot)
        kept = [tensor.clone() for tensor in batch]
        for tensor in batch:
            tensor.zero_()
        assert all(torch.equal(a, b) for a, b in zip(inputs.slots[slot], kept, strict=True))
        inputs.done(slot)
    assert used == [0, 1, 0] and SLOTS == 2
    assert places == [[t.data_ptr() for t in slot] for slot in inputs.slots]
    assert isinstance(inputs.slots[0], Batch)


@pytest.mark.parametrize("order", ["full first", "short first"])
def test_each_size_of_batches_has_slots_of_its_own(order):
    """A run that goes on with an epoch's last, short batch first must not run all full ones without a graph."""
    seen = []
    static = Static(lambda batch: seen.append(batch.label.data_ptr()) or batch.label.sum(), CPU)
    full, tail = random_batches(1, 9)[0], random_batches(1, 4)[0]
    batches = (full, tail, full, full, tail) if order == "full first" else (tail, full, full, full, tail)
    for batch in batches:
        assert static(batch) == batch.label.sum()
    assert full.label.data_ptr() not in seen and tail.label.data_ptr() not in seen
    places = {9: [], 4: []}
    for batch, place in zip(batches, seen, strict=True):
        places[len(batch.label)].append(place)
    assert places[9][0] == places[9][2] != places[9][1] and places[4][0] != places[4][1]


def test_sizes_beyond_the_first_few_go_the_direct_way_and_that_is_said_once(capsys):
    seen = []
    static = Static(lambda batch: seen.append(batch.label.data_ptr()) or batch.label.sum(), CPU)
    batches = [random_batches(1, rows)[0] for rows in range(3, 3 + MOST_SIZES + 2)]
    for batch in (*batches, *batches):
        assert static(batch) == batch.label.sum()
    direct = [batch.label.data_ptr() for batch in batches[MOST_SIZES:]]
    assert seen[MOST_SIZES : MOST_SIZES + 2] == seen[-2:] == direct
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "--cuda_graphs: batches of 7 rows run without a graph, as do all but those of 3, 4, 5, 6"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_an_error():
    with pytest.raises(ConfigError, match="--cuda_graphs: expected a GPU"):
        make_trainer().use_cuda_graphs()
    with pytest.raises(ConfigError, match="--cuda_graphs: expected --optimizer sgd or adam, got adagrad"):
        make_trainer(optimizer="adagrad").use_cuda_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "precision", [Precision(), Precision(torch.bfloat16), Precision(torch.float16, 2.0**40, True)], ids=str
)
def test_graph_and_eager_train_alike(precision, optimizer):
    device = torch.device("cuda")
    eager, graph = (make_trainer(device, precision, optimizer) for _ in range(2))
    graph.use_cuda_graphs()
    # Distinct ids a table in every batch, so that atomics have one order only and the bits can be compared.
    batches = []
    for batch in with_tails(24, 48):
        sparse = batch.sparse.clone()
        sparse[:, 2] = torch.arange(len(sparse)) * 4 % 200
        batches.append(Batch(batch.dense, sparse, batch.label))
    for batch in batches:
        a, b = eager.step(Batch(*(t.to(device) for t in batch))), graph.step(batch)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(eager.model.parameters(), graph.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if graph.loss_scale:
        assert graph.loss_scale.state() == eager.loss_scale.state() and graph.loss_scale.skipped > 0


@pytest.mark.gpu
def test_loop_and_evaluation_with_graphs():
    device = torch.device("cuda")
    test = with_tails(6, 32)
    results = []
    for graphs in (False, True):
        trainer = make_trainer(device)
        if graphs:
            trainer.use_cuda_graphs()
        loader = ListLoader([Batch(*(t.to(device) for t in batch)) for batch in with_tails(18, 48)])
        tests = [Batch(*(t.to(device) for t in batch)) for batch in test]

        def score(trainer=trainer, tests=tests):
            return trainer.evaluate(tests, len(tests), "test")

        fit(trainer, loader, score, LoopOptions(epochs=2, test_freq=9))
        results.append(score())
    assert results[1].auc == pytest.approx(results[0].auc, abs=1e-4)
    assert results[1].log_loss == pytest.approx(results[0].log_loss, rel=1e-4)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_refused():
    trainer = make_trainer(torch.device("cuda"))
    trainer.use_cuda_graphs()
    trainer.exchange = lambda tensors: tensors[0].sum().item()
    batches = [Batch(*(t.cuda() for t in batch)) for batch in random_batches(6, 16)]
    with pytest.raises(ConfigError, match="--cuda_graphs: this step cannot be recorded"):
        for batch in batches:
            trainer.step(batch)
