"""Which rows of a day are kept: a seeded choice that depends on the row's place alone."""

import numpy as np

from gpu_etl.random_keys import row_keys
from gpu_etl.schema import Preset

SAMPLE, NEGATIVES = 1, 2  # independent streams of random numbers


def _chosen(seed: int, stream: int, day: int, first_row: int, rows: int, share: float) -> np.ndarray:
    """bool [rows]: True for about `share` of the rows."""
    stream_seed = int(row_keys(int(row_keys(seed, stream, 1)[0]), day, 1)[0])
    return row_keys(stream_seed, first_row, rows) / 2.0**64 < share


def dropped_rows(
    labels: np.ndarray, preset: Preset, seed: int, day: int, last: bool, first_row: int
) -> dict[str, np.ndarray]:
    """Which rows go, by reason: {"sampled": bool [n], "negatives": bool [n]}, no row in both.

    labels uint32 [n]; first_row: the first one's place in its day file, bad rows counted; last: it is the last day.
    """
    rows = len(labels)
    share = preset.sample_last if last else preset.sample
    sampled = ~_chosen(seed, SAMPLE, day, first_row, rows, share)
    negatives = ~sampled & (labels == 0) & _chosen(seed, NEGATIVES, day, first_row, rows, preset.drop_negatives)
    return {"sampled": sampled, "negatives": negatives}
