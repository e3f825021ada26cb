"""Slow, obvious Python that everything is held against. Shares no code with the project."""

import math

from gpu_etl.doctor.specification import (
    COLUMNS,
    FIELDS,
    HEX,
    INTEGER,
    LABEL,
    RANGE,
    encode_days,
    parse_row,
    read_rows,
    vocabularies,
    write_rows,
)

__all__ = [
    "COLUMNS", "FIELDS", "HEX", "INTEGER", "LABEL", "RANGE", "auc", "encode_days", "learning_rate", "log_dense",
    "parse_row", "read_rows", "vocabularies", "write_rows",
]  # fmt: skip


def auc(scores, labels) -> float:
    """Area under the ROC curve by comparing every positive with every negative."""
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def learning_rate(step, lr, warmup, factor, start, steps, power, end):
    """The schedule as MLPerf v0.7 defines it: a factor of lr."""
    if step <= warmup:
        return lr * (1 - (warmup - step) / (warmup * 2**factor))
    if step <= start or steps == 0:
        return lr
    if step <= start + steps:
        return lr * max(((start + steps - step) / steps) ** power, end / lr)
    return end


def log_dense(value: int) -> float:
    """What the loaders make of a record's integer."""
    return math.log(value + 1)
