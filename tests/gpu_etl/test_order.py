"""The order of rows: every row once, the same for any number of ranks, resumable, and random where it should be."""

from itertools import chain

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st

from gpu_etl.load.order import UNIT_ROWS, Order, permuted

ORDERS = st.builds(
    Order, rows=st.integers(1, 700), batch_size=st.integers(1, 90), shuffle=st.booleans(), seed=st.integers(0, 3),
    buffer=st.sampled_from([0, 1, 50, 200, 10_000]),
)  # fmt: skip


def batches(order, epoch=0, start=0, in_memory=False):
    """Row numbers of each batch."""
    units = list(order.units(epoch, start, in_memory))
    assert all(sum(unit.sizes) == len(unit.rows()) for unit in units)
    cut = [np.split(unit.rows(), np.cumsum(unit.sizes)[:-1]) for unit in units]
    return [batch.tolist() for batch in chain.from_iterable(cut)]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 100, 1000, 1023, 99_991])
def test_a_permutation_has_each_number_once(rows):
    whole = permuted(5, rows, 0, rows)
    assert sorted(whole.tolist()) == list(range(rows))
    middle = rows // 3
    assert permuted(5, rows, middle, rows - middle).tolist() == whole[middle:].tolist()
    assert rows < 16 or permuted(6, rows, 0, rows).tolist() != whole.tolist()


def test_large_permutations_stay_within_their_rows():
    rows = (1 << 40) + 12345
    places = permuted(1, rows, rows - 1000, 1000)
    assert places.min() >= 0 and places.max() < rows and len(set(places.tolist())) == 1000


def test_every_number_goes_everywhere_and_next_to_any_other_alike():
    rows, seeds = 90, 20_000
    places, pairs = np.zeros((rows, rows)), np.zeros((rows, rows))
    for seed in range(seeds):
        found = permuted(seed, rows, 0, rows)
        places[np.arange(rows), found] += 1
        pairs[found[:-1], found[1:]] += 1
    neighbours = pairs[~np.eye(rows, dtype=bool)]
    for counts, freedom in ((places, (rows - 1) ** 2), (neighbours, len(neighbours))):
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@given(ORDERS, st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_each_row_comes_once_in_batches_of_the_right_size(order, epoch):
    found = batches(order, epoch)
    assert sorted(chain.from_iterable(found)) == list(range(order.rows))
    whole, rest = divmod(order.rows, order.batch_size)
    assert list(map(len, found)) == [order.batch_size] * whole + [rest] * bool(rest) and len(found) == len(order)
    assert batches(order, epoch, in_memory=True) == found


@given(ORDERS, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_shares_of_ranks_make_up_the_global_batches(order, world):
    shares = [batches(Order(**{**vars(order), "rank": rank, "world": world}), 1) for rank in range(world)]
    assert {len(share) for share in shares} == {len(order)}
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == batches(order, 1)
    for parts in zip(*shares, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(ORDERS, st.data())
@settings(max_examples=200, deadline=None)
def test_going_on_reads_no_window_or_batch_that_is_done(order, data):
    start = data.draw(st.integers(0, len(order)))
    assert batches(order, 1, start) == batches(order, 1)[start:]
    read = sum(unit.rows_read for unit in order.units(1, start))
    first = start // order.window * order.window  # a window is read in whole
    assert read == (order.rows - first * order.batch_size if start < len(order) else 0)


def test_windows_mix_rows_and_only_theirs():
    order = Order(1000, 10, True, 1, buffer=95)
    plain = order.ranges(3)
    found = batches(order, 3)
    for first in range(0, 100, order.window):
        expected = chain.from_iterable(range(*of) for of in plain[first : first + 10])
        inside = list(chain.from_iterable(found[first : first + 10]))
        assert sorted(inside) == sorted(expected) and inside != sorted(inside)
        assert all(len({row // 10 for row in batch}) > 3 for batch in found[first : first + 10])
    others = [batches(Order(1000, 10, True, seed, buffer=95), epoch) for seed, epoch in ((1, 4), (2, 3))]
    assert found not in others and others[0] != others[1]


def test_each_window_has_an_order_of_its_own():
    order = Order(1000, 10, False, 1, buffer=100)
    rows = np.array(batches(order)).reshape(10, 100)  # ten windows
    inside = {tuple(window - 100 * number) for number, window in enumerate(rows)}
    assert len(inside) == 10


def test_small_batches_are_read_together_and_large_ones_alone():
    assert next(len(unit.sizes) for unit in Order(200_000, 2048).units(0)) == UNIT_ROWS // 2048
    assert [len(unit.sizes) for unit in Order(200_000, 100_000).units(0)] == [1, 1]
