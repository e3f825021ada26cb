"""Times of a step, computed by hand for two ranks and a machine of round numbers."""

from dataclasses import replace

import pytest

from model.planner.cost_model import Job, Machine, rank_bytes, rank_cost
from model.planner.plan import Piece, Plan, whole
from tests.model.helpers import SIZES, small_config

MACHINE = Machine("round", memory=1e9, stream=1e6, matrix=1e6, link=1e3, network=1e2, latency=0.5, overhead=0.25)
# Table 0 on both ranks, 1 whole on rank 0, 2 by rows, 3 by columns: rank 0 holds 8 + 8 + 3 columns, rank 1 8 + 5.
PIECES = (0, 1, 0, 11, 0, 8), (0, 2, 0, 50, 0, 8), (1, 2, 50, 200, 0, 8), (0, 3, 0, 1, 0, 3), (1, 3, 0, 1, 3, 8)
PLAN = Plan(2, SIZES, 8, (0,), tuple(sorted(Piece(*piece) for piece in PIECES)))
JOB = Job(small_config(), batch_size=10)  # 5 rows a rank; 13-16-8, then 8 + 10 products + 1 = 19 inputs, 16-1
BOTTOM, REST = 13 * 16 + 16 * 8, 19 * 16 + 16  # weights: 336, 320
NUMBERS = BOTTOM + 16 + 8 + REST + 16 + 1  # with the biases


def test_two_ranks():
    cost = rank_cost(PLAN, JOB, MACHINE, 0)
    forward = 2 * 5 * 336  # operations of the bottom MLP
    interaction = 5 * (3 * (4 * 8 + 8) + 2 * 19) * 2  # bytes, of 16-bit numbers
    # 5 numbers a look-up (read, written out; gradient, row read, row written), 4 a replicated one; its dense gradient
    # is written, reduced and read, its rows written; what is sent is packed and unpacked.
    tables = 10 * 19 * 5 * 4 + 5 * 8 * 4 * 4 + 3 * 8 * 4 * 4 + 2 * (5 * 19 * 4 + 5 * 13 * 4)
    assert cost.mlps == pytest.approx(6 * 5 * (336 + 320) / 1e6 * 1e3)
    assert cost.interaction == pytest.approx(interaction / 1e6 * 1e3)
    assert cost.tables == pytest.approx(tables / 1e6 * 1e3)
    one_way, reduce = 5 * 19 * 4 / 1e3 + 0.5, (3 * 8 + NUMBERS) * 4 / 1e3 + 0.5
    assert cost.vectors == pytest.approx(2 * one_way * 1e3)
    assert cost.all_reduce == pytest.approx(reduce * 1e3)
    hidden = forward / 1e6, 2 * forward / 1e6, 2 * forward / 1e6 + interaction / 1e6 / 2
    assert cost.exposed == pytest.approx((one_way - hidden[0] + one_way - hidden[1] + reduce - hidden[2]) * 1e3)
    assert cost.overhead == pytest.approx(250)
    assert cost.milliseconds == pytest.approx(cost.mlps + cost.interaction + cost.tables + cost.exposed + 250)
    assert cost.bytes_sent == 5 * 2 * 4 + 5 * 19 * 4 + 5 * 13 * 4 + (3 * 8 + NUMBERS) * 4


def test_what_hides_all_exposes_nothing():
    cost = rank_cost(PLAN, JOB, replace(MACHINE, link=1e12, latency=0.0), 1)
    assert cost.exposed == 0 and cost.vectors > 0


@pytest.mark.parametrize(("optimizer", "look_up", "replicated"), [
    ("sgd", 20, 16), ("rowwise_adagrad", 20 + 2 * 4 / 8, 16), ("adagrad", 28, 24), ("adam", 36, 32),
])  # fmt: skip
def test_optimisers_read_and_write_what_they_remember(optimizer, look_up, replicated):
    cost = rank_cost(PLAN, replace(JOB, optimizer=optimizer), MACHINE, 0)
    tables = 10 * 19 * look_up + 5 * 8 * 16 + 3 * 8 * replicated + 2 * (5 * 19 * 4 + 5 * 13 * 4)
    assert cost.tables == pytest.approx(tables / 1e6 * 1e3)


def test_one_rank_exchanges_nothing():
    plan = whole(1, JOB.config, [0] * 4)
    cost = rank_cost(plan, JOB, MACHINE, 0)
    assert (cost.vectors, cost.all_reduce, cost.exposed, cost.bytes_sent) == (0, 0, 0, 0)
    assert cost.mlps == pytest.approx(6 * 10 * 656 / 1e6 * 1e3)
    assert cost.tables == pytest.approx(10 * 32 * 20 / 1e6 * 1e3)


def test_memory_of_a_rank():
    held = (11 + 1) * 8 * 4 + (50 + 1) * 8 * 4 + (1 + 1) * 3 * 4  # a row more each, for what is not there
    sent = 2 * 10 * (4 + 4) * 19
    copies, received = 3 * 8 * 4 * 2, 2 * 5 * (4 + 4) * (8 + 8 + 8 + 3 + 5)
    mlps, activations = 5 * 4 * NUMBERS, 2 * 5 * 2 * (16 + 8 + 16 + 1)
    assert rank_bytes(PLAN, JOB, 0) == held + sent + copies + received + mlps + activations


@pytest.mark.parametrize(("world", "expected"), [
    (2, 1e3), (8, 1e3),
    (9, 800),  # of 8 shares, 1 by the network: 1/8 / 100 s a byte; 7/8 / 1000 within is less
    (16, 187.5),  # of 15 shares, 8 by the network
])  # fmt: skip
def test_links(world, expected):
    """Beyond a node of 8 ranks, the share that leaves it takes the network."""
    assert MACHINE.link_to(world) == pytest.approx(expected)
