"""The generator's rows, and its truth recomputed from the text alone."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from gpu_etl.common.errors import DataError
from gpu_etl.raw import synthetic
from gpu_etl.rows.scalar import hash32
from tests import reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    return folder, synthetic.write_days(folder, rows=30_000, days=3, seed=4, compress=True)


def rows_of(folder, day):
    return reference.read_rows(gzip.decompress((folder / f"day_{day}.gz").read_bytes()))


def logit(model, sizes, row):
    """The formula at the top of synthetic.py, from a row's text."""
    total = synthetic.BIAS
    for j, value in enumerate(row[1:14]):
        t = (np.log(1 + max(value or 0, 0)) - synthetic.LOG_MEAN[j]) / synthetic.LOG_DEVIATION[j]
        t = np.clip(t, -2, 2)
        total += model.linear[j] * t + model.square[j] * t**2
    ranks = []
    for c, value in enumerate(row[14:]):
        rank = None if value is None else rank_of(c, sizes[c])[value]
        ranks.append(rank)
        if rank is not None:
            total += model.main[model.begins[c] + rank]
    for c, d in synthetic.PAIRS:
        if ranks[c] is not None and ranks[d] is not None:
            total += model.vectors[model.begins[c] + ranks[c]] @ model.vectors[model.begins[d] + ranks[d]]
    return total


RANKS = {}


def rank_of(c, size):
    if c not in RANKS:
        RANKS[c] = {hash32(hash32(c + 1) ^ rank): rank for rank in range(size)}
    return RANKS[c]


def test_probabilities_are_those_of_the_known_model(made):
    folder, _ = made
    model, sizes = synthetic.draw_model(30_000, 4), synthetic.cardinalities(30_000)
    truth = np.load(folder / "probability_day_1.npy")
    for i, row in enumerate(rows_of(folder, 1)[:200]):
        assert truth[i] == pytest.approx(1 / (1 + np.exp(-logit(model, sizes, row))), rel=1e-5)


def test_labels_follow_the_probabilities(made):
    folder, _ = made
    probability = np.concatenate([np.load(folder / f"probability_day_{day}.npy") for day in range(3)]).astype(float)
    labels = np.array([row[0] for day in range(3) for row in rows_of(folder, day)])
    for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1)):
        inside = (probability >= low) & (probability < high)
        p = probability[inside]
        assert abs(labels[inside].sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


def test_truth_file_holds_the_best_auc(made):
    folder, returned = made
    assert json.loads((folder / "truth.json").read_text()) == returned
    labels = [row[0] for row in rows_of(folder, 2)][:5000]
    probability = np.load(folder / "probability_day_2.npy")[:5000]
    assert returned["test"]["rows"] == 5000
    assert returned["test"]["best_auc"] == pytest.approx(reference.auc(probability.tolist(), labels), abs=1e-6)
    assert returned["test"]["best_auc_without_pairs"] < returned["test"]["best_auc"] - 0.02


def test_rows_have_criteos_shape(made):
    folder, _ = made
    rows = [row for day in range(3) for row in rows_of(folder, day)]
    missing = np.mean([[value is None for value in row] for row in rows], 0)
    np.testing.assert_allclose(missing[1:], synthetic.MISSING_DENSE + synthetic.MISSING_SPARSE, atol=0.02)
    assert min(row[2] for row in rows if row[2] is not None) == -2
    first = [row[14] for row in rows]
    counts = np.sort(np.unique(first, return_counts=True)[1])[::-1]
    assert counts[0] > 0.1 * len(rows) and (counts == 1).sum() > 100


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes(made, tmp_path):
    folder, _ = made
    synthetic.write_days(tmp_path / "again", 30_000, 3, seed=4, compress=True)
    assert digests(tmp_path / "again") == digests(folder)
    synthetic.write_days(tmp_path / "other", 30_000, 3, seed=5, compress=False)
    assert (tmp_path / "other" / "day_0").read_bytes() != gzip.decompress((folder / "day_0.gz").read_bytes())


@pytest.mark.parametrize(("rows", "days"), [(100, 1), (20, 3)])
def test_too_few_rows_or_days(tmp_path, rows, days):
    with pytest.raises(DataError, match="expected 2 days or more"):
        synthetic.write_days(tmp_path, rows, days, 0, True)
