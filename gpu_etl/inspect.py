"""What a data set holds: figures from its manifest and from one pass over its rows. inspect_show.py shows them."""

from pathlib import Path

import numpy as np

from gpu_etl.load.dataset import open_dataset
from gpu_etl.manifest import Manifest
from gpu_etl.schema import COLUMN_NAMES, DENSE, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE, SPARSE, SPLITS

BLOCK_ROWS = 1 << 17
RUNS = 20
TOPS = (1, 10, 100)
QUARTILES = (25, 50, 75)
# What the number 0 stands for, by the preset's rule for integers.
ZEROS = {
    "clamp": "missing, negative and real zeros, merged in the record",
    "min": "none, the smallest number of a day is 1",
    "plus2": "missing and below -1, merged in the record",
}
ID_LIMIT = int(np.iinfo(RECORD_DTYPE).max) + 1


class _Labels:
    """Rows and clicks of one split, over RUNS equal runs of rows in file order."""

    def __init__(self, rows: int):
        self.edges = rows * np.arange(RUNS + 1) // RUNS
        self.clicks = np.zeros(RUNS, np.int64)

    def add(self, labels: np.ndarray, first_row: int) -> None:
        before = np.concatenate([[0], np.cumsum(labels, dtype=np.int64)])
        self.clicks += np.diff(before[np.clip(self.edges - first_row, 0, len(labels))])

    def figures(self) -> dict:
        rows = int(self.edges[-1])
        runs = zip(self.clicks.tolist(), np.diff(self.edges).tolist(), strict=True)
        return {
            "rows": rows,
            "label_rate": int(self.clicks.sum()) / rows,
            "label_rate_of_runs": [clicks / size if size else None for clicks, size in runs],
        }


class _Integers:
    """Counts of the 13 integer columns; bucket b holds the numbers of b binary digits, so bucket 0 the zeros."""

    def __init__(self):
        self.buckets = np.zeros((DENSE, 32), np.int64)
        self.log_sum = np.zeros(DENSE)
        self.largest = np.zeros(DENSE, np.int64)

    def add(self, values: np.ndarray) -> None:
        exact = values.astype(np.float64)
        digits = np.frexp(exact)[1]
        for c in range(DENSE):
            self.buckets[c] += np.bincount(digits[:, c], minlength=32)
        self.log_sum += np.log1p(exact).sum(axis=0)
        self.largest = np.maximum(self.largest, values.max(axis=0))

    def figures(self, c: int) -> dict:
        rows = int(self.buckets[c].sum())
        # Whole numbers: a quartile on the edge of a bucket must not depend on rounding.
        quartiles = np.searchsorted(100 * np.cumsum(self.buckets[c]), np.array(QUARTILES) * rows).tolist()
        return {
            "zero_share": int(self.buckets[c, 0]) / rows,
            "log_mean": float(self.log_sum[c]) / rows,
            "log_largest": float(np.log1p(self.largest[c])),
            "quartile_buckets": [[1 << b >> 1, (1 << b) - 1] for b in quartiles],
        }


class _Ids:
    """How often the training split shows each id of one category column of a table of `size` rows: 8 B a row."""

    def __init__(self, size: int):
        self.size = size
        self._counts = np.zeros(size, np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count the ids of rows of the training split."""
        # Not bincount: its cost grows with the table, 12 times this one's at 40 M ids.
        np.add.at(self._counts, ids.astype(np.intp), 1)

    def see(self, ids: np.ndarray) -> None:
        """Note ids of other splits."""

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Counts int64 of ids."""
        return self._counts[ids]

    def counts(self) -> np.ndarray:
        """Counts int64 [n] of all ids that were seen."""
        return self._counts[np.flatnonzero(self._counts)]


class _UnknownIds:
    """The same where no manifest tells the size: about 16 B an id that is seen, however large it is."""

    def __init__(self):
        self._ids = self._counts = np.zeros(0, np.int64)
        self._pieces: list[np.ndarray] = []
        self._waiting = self._largest = 0

    @property
    def size(self) -> int:
        """The largest id + 1."""
        return self._largest + 1

    def add(self, ids: np.ndarray) -> None:
        """Count the ids of rows of the training split."""
        self.see(ids)
        self._pieces.append(ids.copy())
        self._waiting += len(ids)
        if self._waiting >= max(8 * BLOCK_ROWS, len(self._ids)):
            self._merge()

    def see(self, ids: np.ndarray) -> None:
        """Note ids of other splits."""
        self._largest = max(self._largest, int(ids.max()))

    def _merge(self) -> None:
        if self._pieces:
            ids, counts = np.unique(np.concatenate(self._pieces), return_counts=True)
            self._ids, place = np.unique(np.concatenate([self._ids, ids]), return_inverse=True)
            self._counts = np.bincount(place, np.concatenate([self._counts, counts])).astype(np.int64)
            self._pieces, self._waiting = [], 0

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Counts int64 of ids."""
        self._merge()
        if not len(self._ids):
            return np.zeros(len(ids), np.int64)
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._counts[place], 0)

    def counts(self) -> np.ndarray:
        """Counts int64 [n] of all ids that were seen."""
        self._merge()
        return self._counts


def _figures(ids: _Ids | _UnknownIds, rare_id: int, unseen_rows: int, test_rows: int) -> dict:
    counts = ids.counts()
    rows = int(counts.sum())
    top = np.sort(np.partition(counts, len(counts) - TOPS[-1])[-TOPS[-1] :] if len(counts) > TOPS[-1] else counts)[::-1]
    rare = int(ids.of(np.array([rare_id]))[0]) if rare_id < ids.size else 0
    return {
        "table_size": ids.size,
        "ids_in_train": len(counts),
        "rare_id_share": rare / rows,
        **{f"top_{n}_share": int(top[:n].sum()) / rows for n in TOPS},
        "unseen_test_share": unseen_rows / test_rows,
    }


def _meanings(description: Manifest | None) -> dict:
    """What the numbers of the records stand for, by the manifest."""
    if description is None:
        unknown = "unknown without a manifest"
        return {"zero": unknown, "rare_id": 0, "rare": unknown, "order": f"order of the training rows: {unknown}"}
    preset = description.preset()
    rare = [f"values seen fewer than {preset.min_count} times"] * (preset.min_count > 1)
    rare += [f"values beyond {preset.max_table_size:,} ids"] * (preset.max_table_size > 0)
    rare += ["missing values"] * (not preset.missing_is_zero)
    shuffled = description.settings["shuffle"]
    return {
        "zero": ZEROS[preset.dense],
        "rare_id": preset.rare_id,
        "rare": ", ".join(rare) or ("an ordinary value, the first" if preset.first_id == 0 else "no value"),
        "order": "training rows are shuffled" if shuffled else "training rows in order of the days",
    }


def _days(description: Manifest | None) -> list[dict] | None:
    if description is None:
        return None
    return [
        {"file": s["file"], "rows": s["kept"], "label_rate": s["clicks"] / s["kept"] if s["kept"] else None}
        for s in description.sources
    ]


def _missing_shares(description: Manifest | None) -> dict[str, float] | None:
    if description is None:
        return None
    missing = np.sum([source["missing"] for source in description.sources], axis=0)
    rows = sum(source["kept"] for source in description.sources)
    return dict(zip(COLUMN_NAMES[FIRST_DENSE:], (missing / rows).tolist(), strict=True))


def inspect(folder: Path, progress=lambda rows: None) -> dict:
    """Read every record of the data set in `folder` once and return what is in it, as JSON can hold it.

    set: the folder; days: of each day file its rows kept and label_rate, and missing_share: of all rows kept, per
    feature, the share in which its field was empty (both None without a manifest); zero, rare: in words, what the
    integer 0 and the id rare_id stand for; order: of the training rows;
    splits: per split rows, label_rate, label_rate_of_runs over 20 equal runs of rows in file order (None: no rows);
    integers: for I1..I13, over the training split, zero_share, log_mean and log_largest of log(x + 1) with x as the
    record holds it, quartile_buckets [lowest, highest x] of the power-of-two bucket that holds each quartile;
    categories: for C1..C26, over the training split, table_size (largest id of all splits + 1 without a manifest),
    ids_in_train, rare_id_share, top_1_share, top_10_share, top_100_share (rare_id counts as an id), unseen_test_share:
    test rows whose id the training split never shows.

    Shares are of rows, 0 to 1. Memory: some blocks of rows, and 8 B per id of every table, or, without a manifest,
    about 50 B per id seen. `progress` is called with the number of rows read since the last call. Raises DataError
    where the data set cannot be opened, or holds a label or id out of range.
    """
    dataset = open_dataset(folder, "auto")
    description = dataset.manifest
    meanings = _meanings(description)
    labels = {split: _Labels(dataset.splits[split].rows) for split in SPLITS if split in dataset.splits}
    integers = _Integers()
    limits = description.table_sizes if description else [ID_LIMIT] * SPARSE
    categories = [_Ids(size) if description else _UnknownIds() for size in limits]
    unseen = np.zeros(SPARSE, np.int64)
    # In the order of SPLITS: the training split must be counted before the test split asks what it never shows.
    for split in labels:
        source = dataset.splits[split]
        for begin in range(0, source.rows, BLOCK_ROWS):
            end = min(begin + BLOCK_ROWS, source.rows)
            source.check(limits, begin, end)
            block = source.read(begin, end)
            labels[split].add(block[:, 0], begin)
            if split == "train":
                integers.add(block[:, FIRST_DENSE:FIRST_SPARSE])
            for c, found in enumerate(categories):
                ids = block[:, FIRST_SPARSE + c]
                (found.add if split == "train" else found.see)(ids)
                if split == "test":
                    unseen[c] += int((found.of(ids) == 0).sum())
            progress(len(block))
    return {
        "set": str(folder),
        "days": _days(description),
        "missing_share": _missing_shares(description),
        **meanings,
        "splits": {split: counted.figures() for split, counted in labels.items()},
        "integers": {COLUMN_NAMES[FIRST_DENSE + c]: integers.figures(c) for c in range(DENSE)},
        "categories": {
            name: _figures(ids, meanings["rare_id"], rows, dataset.splits["test"].rows)
            for name, ids, rows in zip(COLUMN_NAMES[FIRST_SPARSE:], categories, unseen.tolist(), strict=True)
        },
    }
