"""Exact metrics of binary predictions."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Metrics:
    """Over `rows` rows: auc, area under the ROC curve; log_loss, mean in nats; normalized_entropy, log loss over that
    of always predicting the mean label (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook");
    calibration, sum of predicted probabilities over sum of labels. NaN where one class is missing."""

    auc: float
    log_loss: float
    normalized_entropy: float
    calibration: float
    rows: int


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Exact area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counted half.

    scores float [N], labels [N] of 0 and 1. Counts pairs in 64-bit integers, so nothing is lost in summing. NaN where
    one class is missing or a score is NaN.
    """
    if torch.isnan(scores).any():
        return float("nan")
    ordered, order = scores.sort()
    positive = labels[order].to(torch.int64)
    # Equal scores share their mean rank; twice that rank is whole: its run's first rank plus its last.
    _, run, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0)
    twice_rank = (2 * ends - sizes + 1)[run]
    positives = int(positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        return float("nan")
    twice_wins = int((twice_rank * positive).sum()) - positives * (positives + 1)
    return twice_wins / (2 * positives * negatives)


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean binary cross-entropy (nats) of logits [N], summed in float64."""
    return F.binary_cross_entropy_with_logits(logits.double(), labels.double()).item()


def measure(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """Metrics of logits float [N] against labels [N]."""
    loss, rate = log_loss(logits, labels), labels.double().mean().item()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan
    calibration = torch.sigmoid(logits.double()).mean().item() / rate if rate else math.nan
    return Metrics(auc(logits, labels), loss, loss / entropy, calibration, len(labels))
