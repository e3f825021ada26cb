"""Many ranks train as one process does: every kind of placement, optimiser and world size, uneven tails included."""

import pytest
import torch

from gpu_etl.load.batch import rank_range
from model.config import ModelConfig
from model.distributed.trainer import RankLoader, RankTrainer, make_model
from model.dlrm import DLRM
from model.layers.optimizers import NAMES, Optimizer
from model.planner.plan import Piece, Plan
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import SIZES, Batch, random_batches, small_config
from tests.ranks import run_ranks

SCHEDULE = Schedule(lr=0.2, warmup_steps=5)
LR = {"sgd": 0.3, "rowwise_adagrad": 0.05, "adagrad": 0.05, "adam": 0.01}
DIM = 8


def make_plan(kind: str, world: int) -> Plan:
    """All tables placed alike; mixed: one of each kind, cut into rows and columns at once as well."""
    pieces, replicated = [], []
    for t, size in enumerate(SIZES):
        what = kind if kind != "mixed" else ("replicated", "rows", "both", "whole")[t]
        rows = [size * i // world for i in range(world + 1)]
        columns = [DIM * i // world for i in range(world + 1)]
        if what == "replicated":
            replicated.append(t)
        elif what == "whole":
            pieces.append(Piece((t + 1) % world, t, 0, size, 0, DIM))
        elif what == "rows":
            pieces += [Piece((r + t) % world, t, rows[r], rows[r + 1], 0, DIM) for r in range(world)]
        elif what == "columns":
            pieces += [Piece(r, t, 0, size, columns[r], columns[r + 1]) for r in range(world)]
        else:
            half = max(1, size // 2)
            places = ((0, 0, half, 0, 3), (world - 1, 0, half, 3, DIM), (world - 1, half, size, 0, DIM))
            pieces += [Piece(rank, t, *place) for rank, *place in places]
    pieces = [piece for piece in pieces if piece.rows]
    return Plan(world, SIZES, DIM, tuple(replicated), tuple(sorted(pieces)))


class Shares:
    """A rank's shares of batches, with the interface of gpu_etl.load."""

    def __init__(self, batches, ranks):
        self._batches, self._ranks = batches, ranks

    def batches(self, epoch=0, start=0):
        for batch in self._batches[start:]:
            begin, end = rank_range(0, len(batch.label), self._ranks.rank, self._ranks.world)
            yield Batch(*(tensor[begin:end] for tensor in batch))


def batches(count: int = 50, tail: int = 5):
    """Full batches of 32 rows, the last one of `tail`."""
    found = random_batches(count, 32)
    return [*found[:-1], Batch(*(tensor[:tail] for tensor in found[-1]))]


def trainer_of(ranks, plan, name, config, wire=torch.float32, precision=Precision(), seed=0):  # noqa: B008 - frozen
    plan.check(config, ranks.world, name, "the test's plan")
    torch.manual_seed(seed)
    model = make_model(config, plan, ranks, Optimizer(name), wire)
    return RankTrainer(ranks, model, SCHEDULE, precision, Optimizer("sgd"), LR[name] / SCHEDULE.lr)


def curve_of_ranks(ranks, plan, name, config, found, *settings):
    """Losses of the global batches, and the parts of the tables held at the end."""
    trainer = trainer_of(ranks, plan, name, config, *settings)
    rows = sum(len(batch.label) for batch in found)
    loader = RankLoader(Shares(found, ranks), trainer.model.embedding, len(found[0].label), rows)
    losses = trainer.whole_losses(torch.stack([trainer.step(batch) for batch in loader.batches()]))
    parts = [(p, weight.clone()) for held in trainer.model.embedding.parts() for p, weight, _ in held]
    return losses.tolist(), parts, [p.detach().clone() for p in trainer.model.dense_parameters()]


def curves_of_ranks(ranks, jobs):
    return [curve_of_ranks(ranks, *job) for job in jobs]


def curve_alone(name, config, found, precision=Precision()):  # noqa: B008 - frozen
    torch.manual_seed(0)
    model = DLRM(config, True, Optimizer(name))
    trainer = Trainer(model, SCHEDULE, precision, Optimizer("sgd"), LR[name] / SCHEDULE.lr)
    return [trainer.step(batch).item() for batch in found], trainer


def check(found, alone, trainer, tolerance=1e-5):
    tables = trainer.model.embedding.tables()
    for losses, parts, mlps in found:
        assert losses == pytest.approx(alone, abs=tolerance)
        for p, weight in parts:
            expected = tables[p.table][p.begin : p.end, p.left : p.right]
            torch.testing.assert_close(weight, expected, rtol=20 * tolerance, atol=20 * tolerance)
        for ours, expected in zip(mlps, trainer.model.dense_parameters(), strict=True):
            torch.testing.assert_close(ours, expected.detach(), rtol=20 * tolerance, atol=20 * tolerance)


def check_all(world, jobs):
    """Each job (plan, optimiser, configuration, batches) on `world` ranks against one process."""
    found = run_ranks(world, curves_of_ranks, jobs)
    for number, (_, *settings) in enumerate(jobs):
        check([of_rank[number] for of_rank in found], *curve_alone(*settings))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_curve_is_that_of_one_process_whatever_the_placement(world):
    found, config = batches(), small_config()
    kinds = ("whole", "rows", "columns", "replicated", "mixed")
    alone, _ = curve_alone("sgd", config, found)
    assert alone[0] - alone[-2] > 0.05  # it learns
    check_all(world, [(make_plan(kind, world), "sgd", config, found) for kind in kinds])


def test_every_optimiser_is_exact():
    found, config = batches(tail=2), small_config()  # in the tail one of three ranks has no row at all
    kinds = ("mixed", "rows", "columns", "replicated", "whole")
    jobs = [(make_plan(kind, 3), name, config, found) for name in NAMES[1:] for kind in kinds]
    check_all(3, [job for job in jobs if job[1] != "rowwise_adagrad" or all(p.width == DIM for p in job[0].pieces)])


def test_ids_are_hashed_and_a_rank_may_hold_nothing():
    config = small_config(hash_indices=True)
    found = [batch._replace(sparse=batch.sparse * 7) for batch in batches(20)]
    plan = Plan(3, SIZES, DIM, (0,), tuple(Piece(1, t, 0, SIZES[t], 0, DIM) for t in (1, 2, 3)))
    check_all(3, [(plan, "sgd", config, found)])


def test_lower_precision_follows():
    found, config, plan = batches(), small_config(), make_plan("mixed", 2)
    exact, half = Precision(), Precision(torch.bfloat16)
    scaled = Precision(torch.float16, 1024.0, dynamic=True)
    cases = [(torch.bfloat16, exact, 5e-3), (torch.float16, exact, 5e-3), (torch.float32, half, 0.05),
             (torch.float32, scaled, 0.01)]  # fmt: skip
    jobs = [(plan, "sgd", config, found, wire, precision) for wire, precision, _ in cases]
    alone = {precision: curve_alone("sgd", config, found, precision)[0] for precision in {case[1] for case in cases}}
    for of_rank in run_ranks(2, curves_of_ranks, jobs):
        for (wire, precision, tolerance), (losses, _, _) in zip(cases, of_rank, strict=True):
            assert losses == pytest.approx(alone[precision], abs=tolerance)
            assert wire == torch.float32 or losses != pytest.approx(alone[precision], abs=1e-7)


def skips_of_ranks(ranks, plan, config, found):
    """What the loss scale did, the MLPs and the replicated table at the end, on a rank that alone has an overflow."""
    trainer = trainer_of(ranks, plan, "sgd", config, torch.float32, Precision(torch.float16, 1024.0, dynamic=True))
    rows = sum(len(batch.label) for batch in found)
    loader = RankLoader(Shares(found, ranks), trainer.model.embedding, len(found[0].label), rows)
    for number, batch in enumerate(loader.batches()):
        if number == 3 and ranks.rank == 1:
            batch.dense[:, 0] = 60_000.0
        before = [p.detach().clone() for p in trainer.model.dense_parameters()]
        trainer.step(batch)
        same = all(map(torch.equal, before, trainer.model.dense_parameters()))
        assert same == (number == 3)
    tables = [weight.clone() for held in trainer.model.embedding.parts() for _, weight, _ in held[:1]]
    return trainer.loss_scale.state(), [p.detach().clone() for p in trainer.model.dense_parameters()], tables


def test_a_step_that_overflows_on_one_rank_is_skipped_on_all():
    found, config = batches(), small_config()
    ends = run_ranks(2, skips_of_ranks, make_plan("replicated", 2), config, found[:6])
    for state, mlps, tables in ends:
        assert state["skipped"] == 1 and state["scale"] == 512.0
        assert all(map(torch.equal, mlps, ends[0][1])) and all(map(torch.equal, tables, ends[0][2]))


@pytest.mark.gpu
def test_by_nccl_on_one_gpu():
    """One rank with tables cut into pieces, so that nothing of the exchange is left out."""
    found, config = batches(), small_config()
    jobs = [(make_plan(kind, 1), "sgd", config, found) for kind in ("whole", "mixed")]
    alone, _ = curve_alone("sgd", config, found)
    (of_rank,) = run_ranks(1, curves_on_gpu, jobs, device="cuda")
    for losses in of_rank:
        assert losses == pytest.approx(alone, abs=1e-4)


def curves_on_gpu(ranks, jobs):
    curves = []
    for plan, name, config, found in jobs:
        trainer = trainer_of(ranks, plan, name, config)
        with torch.no_grad():  # a GPU draws other numbers
            torch.manual_seed(0)
            model = DLRM(config)
            for ours, theirs in zip(trainer.model.dense_parameters(), model.dense_parameters(), strict=True):
                ours.copy_(theirs)
            for p, weight, _ in (piece for held in trainer.model.embedding.parts() for piece in held):
                weight.copy_(model.embedding.tables()[p.table][p.begin : p.end, p.left : p.right])
        found = [Batch(*(tensor.cuda() for tensor in batch)) for batch in found]
        rows = sum(len(batch.label) for batch in found)
        loader = RankLoader(Shares(found, ranks), trainer.model.embedding, len(found[0].label), rows)
        losses = trainer.whole_losses(torch.stack([trainer.step(batch) for batch in loader.batches()]))
        curves.append(losses.tolist())
    return curves


def test_large_tables_draw_the_same_numbers():
    config = ModelConfig(13, (5, 300, 90), (4, 16), (4, 1), 16)
    (one, two) = run_ranks(2, drawn, config)
    torch.manual_seed(7)
    tables = DLRM(config).embedding.tables()
    for p, weight in one + two:
        assert torch.equal(weight, tables[p.table][p.begin : p.end, p.left : p.right])


def drawn(ranks, config):
    from model.layers import embedding

    embedding.DRAWN_AT_ONCE = 1000  # a block ends within a piece
    pieces = (Piece(0, 1, 0, 123, 0, 16), Piece(1, 1, 123, 300, 0, 16), Piece(0, 2, 0, 90, 0, 7),
              Piece(1, 2, 0, 90, 7, 16))  # fmt: skip
    torch.manual_seed(7)
    model = make_model(config, Plan(2, config.categorical_feature_sizes, 16, (0,), tuple(sorted(pieces))), ranks)
    return [(p, weight.clone()) for held in model.embedding.parts() for p, weight, _ in held]
