"""Metrics over many ranks are those of one process over all rows, and no rank holds many more than its share."""

import math
from dataclasses import astuple

import pytest
import torch

from model import metrics
from model.distributed import metrics as rank_metrics
from tests.ranks import run_ranks


def cases():
    """(logits, labels, where each of the three ranks' rows end)."""
    generator = torch.Generator().manual_seed(0)

    def logits(rows, decimals=None):
        found = torch.randn(rows, generator=generator)
        return found if decimals is None else found.round(decimals=decimals)

    def labels(rows, rate=0.3):
        return (torch.rand(rows, generator=generator) < rate).float()

    yield logits(3000), labels(3000), (1000, 2000)
    yield logits(3000, 1), labels(3000), (10, 2900)  # ties, and very uneven shares
    yield logits(50), labels(50), (0, 50)  # two ranks without a row
    yield torch.zeros(900), labels(900), (300, 600)  # a model that scores all alike
    yield logits(2), torch.tensor([1.0, 0.0]), (1, 2)
    ordered = logits(3000).sort().values
    yield ordered, labels(3000), (1000, 2000)  # each rank a range of its own
    yield torch.tensor([math.inf, -math.inf, 1.0, math.inf]), torch.tensor([1.0, 0.0, 0.0, 0.0]), (1, 3)
    yield logits(30), torch.ones(30), (10, 20)  # one class only
    yield torch.cat([logits(29), torch.tensor([math.nan])]), labels(30, 0.5), (10, 20)


def of_rank(ranks, given):
    found = []
    for logits, labels, (first, second) in given:
        part = slice((0, first, second)[ranks.rank], (first, second, len(logits))[ranks.rank])
        counts = torch.stack([1 - labels[part], labels[part]], 1).long()
        ordered, _ = rank_metrics._runs(logits[part], counts)
        held = len(rank_metrics._share(ordered, counts[: len(ordered)], ranks)[0]) if not logits.isnan().any() else 0
        found.append((rank_metrics.measure(logits[part], labels[part], ranks), held))
    return found


def test_metrics_are_those_of_one_process():
    given = list(cases())
    answers = run_ranks(3, of_rank, given)
    for number, (logits, labels, _) in enumerate(given):
        expected = metrics.measure(logits, labels)
        for answer in answers:
            found, held = answer[number]
            assert found.auc == expected.auc or (math.isnan(found.auc) and math.isnan(expected.auc))
            assert astuple(found) == pytest.approx(astuple(expected), rel=1e-12, nan_ok=True)
            assert held <= 2 * len(logits) / 3 + 9
