"""Learnable raw days in Criteo's shape, drawn from a known model, so that the best AUC anything can reach is known.

A row's click probability is sigmoid(logit). With t_j = (log(x_j + 1) - mean_j) / deviation_j, held within +-2, of the
integers as a record keeps them (missing and negative as 0), and k_c the popularity rank of the row's value in category
column c:

    logit = bias + sum_j (a_j t_j + b_j t_j^2) + sum_c w_c[k_c] + sum_(c,d) u_c[k_c] . u_d[k_d]

The last sum runs over a few pairs of columns and has no share in any column alone: only what models pairs (the dot
interaction) learns it. Effects shrink for rare values, of which a finite number of rows can say little.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpu_etl.common import codecs
from gpu_etl.common.errors import DataError
from gpu_etl.common.jit import compiled
from gpu_etl.rows.random_keys import GOLDEN_GAMMA, mix64, row_keys
from gpu_etl.rows.scalar import NEWLINE, TAB, ZERO, hash32
from gpu_etl.schema import DENSE, SPARSE

TRUTH_FILE = "truth.json"
CHUNK_ROWS = 1 << 16
ROW_BYTES = 13 * 12 + 26 * 9 + 4  # the longest row

# Distinct values per category column in official_config's data, which has about OFFICIAL_ROWS rows. Columns of more
# than UNSCALED values shrink with the number of rows.
CARDINALITIES = (
    932209, 18814, 13624, 6862, 18488, 3, 6242, 1229, 49, 654428, 96850, 69004, 10,
    2134, 7345, 60, 4, 918, 14, 984280, 320932, 838408, 76380, 8906, 74, 33,
)  # fmt: skip
OFFICIAL_ROWS = 8_000_000
UNSCALED = 1000
POPULARITY = 1.2  # exponent of the power law

# Shares of empty fields, and mean and deviation of log(x + 1), rounded from the Criteo Kaggle sample.
MISSING_DENSE = (0.45, 0, 0.21, 0.21, 0.03, 0.22, 0.04, 0, 0.04, 0.45, 0.04, 0.76, 0.21)
MISSING_SPARSE = (0, 0, 0.03, 0.03, 0, 0.12, 0, 0, 0, 0, 0, 0.03, 0, 0, 0, 0.03, 0, 0, 0.44, 0.44, 0.03, 0.76, 0, 0.03, 0.44, 0.44)  # fmt: skip  # noqa: E501
LOG_MEAN = (0.9, 2.1, 2.2, 1.7, 7.3, 3.4, 1.6, 2.0, 3.5, 0.4, 0.9, 0.3, 1.7)
LOG_DEVIATION = (1.0, 2.1, 1.2, 0.9, 2.9, 1.8, 1.4, 1.2, 1.6, 0.4, 0.8, 0.6, 1.0)
LARGEST_INTEGER = 2_000_000
NEGATIVE_COLUMN = 1  # I2 goes down to -2 in a tenth of the rows, as in Criteo

# Pairs of category columns (from 0) that interact: all of few values.
PAIRS = ((5, 8), (12, 16), (16, 18), (5, 25))
RANK = 4  # length of the vectors u
BIAS = -1.5
# Deviations of the parameters. A category column without main effect is noise, as many real ones nearly are.
DENSE_EFFECT = 0.15
LARGEST_T = 2.0
MAIN_EFFECT = (
    0.4, 0, 0.3, 0, 0, 0.3, 0, 0.3, 0.3, 0.3, 0, 0, 0.3,
    0, 0, 0.3, 0.3, 0.3, 0.3, 0.4, 0, 0, 0, 0, 0.3, 0.3,
)  # fmt: skip
PAIR_EFFECT = 0.7
SHRINK_RANK = 5  # effects of the value of popularity rank k are divided by sqrt(1 + k / SHRINK_RANK)


@dataclass(frozen=True)
class TrueModel:
    """The generator's parameters. begins int64 [27]: where each column's ranks begin in main float64 [sum of sizes]
    and vectors float64 [sum of sizes, RANK]; linear and square float64 [13]."""

    seed: int
    begins: np.ndarray
    main: np.ndarray
    vectors: np.ndarray
    linear: np.ndarray
    square: np.ndarray


def cardinalities(rows: int) -> np.ndarray:
    """Distinct values per category column for so many rows, int64 [26]."""
    sizes = np.array(CARDINALITIES)
    scaled = np.maximum(UNSCALED, (sizes * min(1.0, rows / OFFICIAL_ROWS)).astype(np.int64))
    return np.where(sizes <= UNSCALED, sizes, scaled)


def draw_model(rows: int, seed: int, signal: float = 1.0) -> TrueModel:
    """Draw the parameters for a data set of so many rows; every part of the logit but the bias is times `signal`."""
    random = np.random.default_rng(seed)
    sizes = cardinalities(rows)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    ranks = np.concatenate([np.arange(size) for size in sizes])
    shrink = 1 / np.sqrt(1 + ranks / SHRINK_RANK)
    effect = signal * np.repeat(MAIN_EFFECT, sizes)
    pair_effect = np.sqrt(signal * PAIR_EFFECT) * RANK**-0.25
    return TrueModel(
        seed,
        begins,
        main=effect * random.standard_normal(begins[-1]) * shrink,
        vectors=pair_effect * random.standard_normal((begins[-1], RANK)) * shrink[:, None],
        linear=signal * DENSE_EFFECT * random.standard_normal(DENSE),
        square=signal * DENSE_EFFECT / 3 * random.standard_normal(DENSE),
    )


@compiled
def _uniform(key, draw):
    """Uniform float64 in (0, 1) number `draw` of a row with the given random key."""
    bits = mix64(key + GOLDEN_GAMMA * np.uint64(draw + 1))
    return (float(bits >> np.uint64(11)) + 0.5) * 2.0**-53


@compiled
def _draw_integer(key, column, mean, deviation):
    """Log-normal integer of one row and column (Box-Muller), as Criteo's: mostly small, sometimes huge."""
    normal = np.sqrt(-2 * np.log(_uniform(key, 4 * column))) * np.cos(2 * np.pi * _uniform(key, 4 * column + 1))
    value = np.int64(min(np.exp(mean + deviation * normal) - 0.5, LARGEST_INTEGER))
    if column == NEGATIVE_COLUMN and _uniform(key, 4 * column + 3) < 0.1:
        value = -1 - (value & 1)
    return value


@compiled
def _draw_rank(uniform, size):
    """Popularity rank in [0, size) by a power law: the inverse of its distribution function."""
    power = 1.0 - POPULARITY
    rank = np.int64((((size + 1.0) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)) - 1
    return min(max(rank, 0), size - 1)


@compiled
def _put_integer(out, position, value):
    """Write a decimal integer; returns the position behind it."""
    if value < 0:
        out[position] = 45
        position += 1
        value = -value
    digits = 1
    bound = 10
    while value >= bound:
        digits += 1
        bound *= 10
    for i in range(digits):
        out[position + digits - 1 - i] = ZERO + value % 10
        value //= 10
    return position + digits


@compiled
def _put_hex(out, position, value):
    """Write eight hex digits; returns the position behind them."""
    for i in range(8):
        digit = (value >> (28 - 4 * i)) & 15
        out[position + i] = digit + (48 if digit < 10 else 87)
    return position + 8


@compiled
def _write_rows(keys, begins, main, vectors, linear, square, missing, mean, deviation, pairs, out, truth):
    """Draw one row a key into the text `out`. truth float64 [n, 3]: probability, the same without pairs, label.

    Returns the number of bytes written.
    """
    position = 0
    ranks = np.empty(SPARSE, np.int64)
    integers = np.empty(DENSE, np.int64)
    for row in range(len(keys)):
        key = keys[row]
        logit = BIAS
        for j in range(DENSE):
            integers[j] = _draw_integer(key, j, mean[j], deviation[j])
            absent = _uniform(key, 4 * j + 2) < missing[j]
            t = (np.log(1.0 + (0 if absent else max(integers[j], 0))) - mean[j]) / deviation[j]
            t = min(max(t, -LARGEST_T), LARGEST_T)
            logit += linear[j] * t + square[j] * t * t
            if absent:
                integers[j] = np.iinfo(np.int64).min
        for c in range(SPARSE):
            ranks[c] = _draw_rank(_uniform(key, 64 + 2 * c), begins[c + 1] - begins[c])
            if _uniform(key, 65 + 2 * c) < missing[DENSE + c]:
                ranks[c] = -1
            else:
                logit += main[begins[c] + ranks[c]]
        without_pairs = logit
        for p in range(len(pairs)):
            c, d = pairs[p]
            if ranks[c] >= 0 and ranks[d] >= 0:
                for i in range(RANK):
                    logit += vectors[begins[c] + ranks[c], i] * vectors[begins[d] + ranks[d], i]
        truth[row, 0] = 1 / (1 + np.exp(-logit))
        truth[row, 1] = 1 / (1 + np.exp(-without_pairs))
        truth[row, 2] = _uniform(key, 63) < truth[row, 0]
        out[position] = ZERO + np.int64(truth[row, 2])
        position += 1
        for j in range(DENSE):
            out[position] = TAB
            position += 1
            if integers[j] != np.iinfo(np.int64).min:
                position = _put_integer(out, position, integers[j])
        for c in range(SPARSE):
            out[position] = TAB
            position += 1
            if ranks[c] >= 0:
                position = _put_hex(out, position, hash32(hash32(c + 1) ^ ranks[c]))
        out[position] = NEWLINE
        position += 1
    return position


def _write_day(path: Path, model: TrueModel, first_row: int, rows: int, compress: bool, bar: tqdm) -> np.ndarray:
    """Write one day file under the name of _part(); returns its truth, float64 [rows, 3] of _write_rows."""
    truth = np.empty((rows, 3))
    out = np.empty(CHUNK_ROWS * ROW_BYTES, np.uint8)
    missing = np.array(MISSING_DENSE + MISSING_SPARSE)
    mean, deviation, pairs = np.array(LOG_MEAN), np.array(LOG_DEVIATION), np.array(PAIRS)
    with open(_part(path), "wb") as raw, codecs.write_gzip(raw) if compress else raw as file:
        for begin in range(0, rows, CHUNK_ROWS):
            end = min(begin + CHUNK_ROWS, rows)
            keys = row_keys(model.seed, first_row + begin, end - begin)
            size = _write_rows(
                keys, model.begins, model.main, model.vectors, model.linear, model.square,
                missing, mean, deviation, pairs, out, truth[begin:end],
            )  # fmt: skip
            file.write(memoryview(out)[:size])
            bar.update(end - begin)
    return truth


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of scores float64 [n] without ties against labels [n] of 0 and 1."""
    ranks = np.flatnonzero(labels[np.argsort(scores)] == 1) + 1
    wins = ranks.sum() - len(ranks) * (len(ranks) + 1) // 2
    return float(wins / (len(ranks) * (len(labels) - len(ranks))))


def _describe(truth: np.ndarray) -> dict:
    """What the true probabilities reach on these rows; None for an AUC of rows that all have the same label."""
    probability, without_pairs, label = truth.T
    loss = -np.mean(np.where(label == 1, np.log(probability), np.log1p(-probability)))
    return {
        "rows": len(truth),
        "click_rate": float(label.mean()),
        "best_auc": auc(probability, label) if 0 < label.sum() < len(label) else None,
        "best_auc_without_pairs": auc(without_pairs, label) if 0 < label.sum() < len(label) else None,
        "best_log_loss": float(loss),
    }


def write_days(out: Path, rows: int, days: int, seed: int, compress: bool, signal: float = 1.0) -> dict:
    """Write day_0 ... (.gz) and their truth into folder `out`; returns what TRUTH_FILE holds.

    probability_day_N.npy: float32 [rows of the day], each row's true click probability. TRUTH_FILE: best AUC and log
    loss, by day and for the rows that `encode` makes the test and validation splits, with and without the pairs' part.
    The same rows, days, seed and signal (see draw_model) make the same bytes. Raises DataError for fewer than two days
    or ten rows a day, for a signal that is not above 0, and where day files are there that it has not made.
    """
    if not 0 < signal < np.inf:
        raise DataError(f"--signal {signal}: expected a number above 0")
    if seed < 0:
        raise DataError(f"--seed {seed}: expected 0 or more")
    if days < 2 or rows < 10 * days:
        raise DataError(f"--rows {rows} --days {days}: expected 2 days or more, of 10 rows or more each")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / (f"day_{day}.gz" if compress else f"day_{day}") for day in range(days)]
    foreign = [path.name for path in paths if path.exists() and not (out / TRUTH_FILE).exists()]
    if foreign:
        raise DataError(
            f"{out}: holds {', '.join(foreign)}, but no {TRUTH_FILE} that says that they are synthetic; they are not "
            "replaced: choose another --out"
        )
    model = draw_model(rows, seed, signal)
    edges = [rows * day // days for day in range(days + 1)]
    bar = tqdm(total=rows, desc="synth", unit="rows", unit_scale=True)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_write_day, path, model, begin, end - begin, compress, bar)
            for path, begin, end in zip(paths, edges, edges[1:], strict=False)
        ]
        truths = [job.result() for job in jobs]
    for path, truth in zip(paths, truths, strict=True):
        np.save(out / f"probability_{path.name.removesuffix('.gz')}.npy", truth[:, 0].astype(np.float32))
    half = (len(truths[-1]) + 1) // 2
    described = {
        "seed": seed,
        "signal": signal,
        "days": {path.name: _describe(truth) for path, truth in zip(paths, truths, strict=True)},
        "test": _describe(truths[-1][:half]),
        "val": _describe(truths[-1][half:]),
    }
    (out / TRUTH_FILE).write_text(json.dumps(described, indent=1, allow_nan=False) + "\n")
    for path in paths:  # behind the truth, so that a run that was killed has left no day without it
        _part(path).rename(path)
    return described
