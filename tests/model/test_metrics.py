"""AUC and log loss against scikit-learn and against counting pairs."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("sklearn")
from hypothesis import given, settings, strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss, roc_auc_score

from model.metrics import auc, log_loss, measure
from tests import reference


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_with_ties_counts_pairs(rows):
    scores, labels = zip(*rows, strict=True)
    found = auc(torch.tensor(scores, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32))
    if len(set(labels)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(reference.auc(scores, labels), abs=1e-15)


@pytest.mark.parametrize("decimals", [1, 3, 8])
def test_auc_and_log_loss_agree_with_scikit_learn(decimals):
    torch.manual_seed(decimals)
    logits = torch.randn(200_000).round(decimals=decimals)
    labels = (torch.rand(200_000) < torch.sigmoid(logits - 1)).float()
    assert auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    probability = torch.sigmoid(logits.double())
    assert log_loss(logits, labels) == pytest.approx(sklearn_log_loss(labels, probability), rel=1e-12)
    assert measure(logits, labels).rows == 200_000


def test_normalized_entropy_and_calibration_by_their_formulas():
    torch.manual_seed(4)
    logits = torch.randn(5000)
    labels = (torch.rand(5000) < 0.3).float()
    found = measure(logits, labels)
    rate = labels.mean().item()
    base = sklearn_log_loss(labels, torch.full((5000,), rate, dtype=torch.float64))
    assert found.normalized_entropy == pytest.approx(found.log_loss / base, rel=1e-6)
    assert found.calibration == pytest.approx(torch.sigmoid(logits).sum().item() / labels.sum().item(), rel=1e-6)
    always = torch.full((5000,), math.log(rate / (1 - rate)))
    perfect = measure(always, labels)
    assert perfect.normalized_entropy == pytest.approx(1, abs=1e-6)
    assert perfect.calibration == pytest.approx(1, abs=1e-6)
    assert math.isnan(measure(logits, torch.zeros(5000)).normalized_entropy)


def test_extreme_logits_do_not_tie_or_overflow():
    logits = torch.tensor([60.0, 50.0, -60.0, -50.0])
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert auc(logits, labels) == 0.75  # as probabilities in float32, 60 and 50 would tie
    assert log_loss(logits, labels) == pytest.approx((50 + 50) / 4, rel=1e-12)


def test_nan_scores_give_nan():
    assert math.isnan(auc(torch.tensor([0.1, float("nan")]), torch.tensor([0.0, 1.0])))
