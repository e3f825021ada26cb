"""What a data set holds: figures from one pass over its records, a table of them for a terminal, a plot."""

from pathlib import Path

import numpy as np

from gpu_etl import manifest
from gpu_etl.errors import DataError
from gpu_etl.load.dataset import RecordFile, open_dataset
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
BELOW = {"loc": "upper center", "ncols": 3, "frameon": False}


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
    """How often the training split shows each id of one category column; size: None where no manifest tells it."""

    def __init__(self, size: int | None):
        self.known_size = size
        self.counts = np.zeros(size or 1, np.int64)
        self.largest = 0
        self.unseen_rows = 0

    def add(self, ids: np.ndarray, split: str) -> None:
        self.largest = max(self.largest, int(ids.max()))
        if self.largest >= len(self.counts):
            # At least doubled, so that ids that rise along the file do not copy the counts at every block.
            grown = np.zeros(max(self.largest + 1, 2 * len(self.counts)), np.int64)
            grown[: len(self.counts)] = self.counts
            self.counts = grown
        if split == "train":
            # Not bincount: its cost grows with the table, 12 times this one's at 40 M ids.
            np.add.at(self.counts, ids.astype(np.intp), 1)
        elif split == "test":
            self.unseen_rows += int((self.counts[ids] == 0).sum())

    def figures(self, rare_id: int, test_rows: int) -> dict:
        size = self.known_size or self.largest + 1
        counts, rows = self.counts[:size], int(self.counts.sum())
        top = np.partition(counts, size - TOPS[-1])[-TOPS[-1] :] if size > TOPS[-1] else counts
        top = np.sort(top)[::-1]
        return {
            "table_size": size,
            "ids_in_train": int(np.count_nonzero(counts)),
            "rare_id_share": int(counts[rare_id : rare_id + 1].sum()) / rows,
            **{f"top_{n}_share": int(top[:n].sum()) / rows for n in TOPS},
            "unseen_test_share": self.unseen_rows / test_rows,
        }


def _meanings(settings: dict | None) -> dict:
    """What the numbers of the records stand for, by the manifest's settings."""
    if settings is None:
        unknown = "unknown without a manifest"
        return {"zero": unknown, "rare_id": 0, "rare": unknown, "order": f"order of the training rows: {unknown}"}
    preset = settings["preset"]
    # Manifests written before the presets had these rules lack them.
    limit, min_count = preset.get("max_table_size", 0), preset["min_count"]
    rare = [f"values seen fewer than {min_count} times"] * (min_count > 1)
    rare += [f"values beyond {limit:,} ids"] * (limit > 0) + ["missing values"] * (not preset["missing_is_zero"])
    return {
        "zero": ZEROS[preset.get("dense", "clamp")],
        "rare_id": preset.get("rare_id", 0),
        "rare": ", ".join(rare) or ("an ordinary value, the first" if preset["first_id"] == 0 else "no value"),
        "order": "training rows are shuffled" if settings["shuffle"] else "training rows in order of the days",
    }


def inspect(folder: Path, progress=lambda rows: None) -> dict:
    """Read every record of the data set in `folder` once and return what is in it, as JSON can hold it.

    set: the folder; zero, rare: in words, what the integer 0 and the id rare_id stand for; order: of the training rows;
    splits: per split rows, label_rate, label_rate_of_runs over 20 equal runs of rows in file order (None: no rows);
    integers: for I1..I13, over the training split, zero_share, log_mean and log_largest of log(x + 1) with x as the
    record holds it, quartile_buckets [lowest, highest x] of the power-of-two bucket that holds each quartile;
    categories: for C1..C26, over the training split, table_size (largest id of all splits + 1 without a manifest),
    ids_in_train, rare_id_share, top_1_share, top_10_share, top_100_share (rare_id counts as an id), unseen_test_share:
    test rows whose id the training split never shows.

    Shares are of rows, 0 to 1. Memory: one block of rows, and 8 B per id of every table. `progress` is called with the
    number of rows read since the last call. Raises DataError where the data set cannot be opened, is not in the form of
    records, or holds a label or id out of range.
    """
    dataset = open_dataset(folder, "auto")
    if not isinstance(dataset.splits["train"], RecordFile):
        raise DataError(f"{folder}: inspect reads 160-byte records, found split files; encode with --format records")
    description = dataset.manifest
    meanings = _meanings(description.settings if description else None)
    labels = {split: _Labels(dataset.splits[split].rows) for split in SPLITS if split in dataset.splits}
    integers = _Integers()
    limits = description.table_sizes if description else [ID_LIMIT] * SPARSE
    categories = [_Ids(size if description else None) for size in limits]
    # In the order of SPLITS: the training split must be counted before the test split asks what it never shows.
    for split in labels:
        source = dataset.splits[split]
        for begin in range(0, source.rows, BLOCK_ROWS):
            block = source.read(begin, min(begin + BLOCK_ROWS, source.rows))
            manifest.check_ids(block, limits, str(source.path), begin)
            labels[split].add(block[:, 0], begin)
            if split == "train":
                integers.add(block[:, FIRST_DENSE:FIRST_SPARSE])
            for c, ids in enumerate(categories):
                ids.add(block[:, FIRST_SPARSE + c], split)
            progress(len(block))
    return {
        "set": str(folder),
        **meanings,
        "splits": {split: counted.figures() for split, counted in labels.items()},
        "integers": {COLUMN_NAMES[FIRST_DENSE + c]: integers.figures(c) for c in range(DENSE)},
        "categories": {
            name: ids.figures(meanings["rare_id"], dataset.splits["test"].rows)
            for name, ids in zip(COLUMN_NAMES[FIRST_SPARSE:], categories, strict=True)
        },
    }


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of cells, the first column to the left, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _split_lines(found: dict) -> list[str]:
    figures = found["splits"].values()
    cells = [["split", *found["splits"]], ["rows", *(f"{f['rows']:,}" for f in figures)]]
    cells.append(["label rate, of rows", *(_percent(f["label_rate"]) for f in figures)])
    for run in range(RUNS):
        place = f"  {100 * run // RUNS:2} to {100 * (run + 1) // RUNS:3} % of the rows"
        cells.append([place, *(_percent(f["label_rate_of_runs"][run]) for f in figures)])
    return [f"Splits, and the label rate over {RUNS} equal runs of rows; {found['order']}.", *_aligned(cells)]


def _integer_lines(found: dict) -> list[str]:
    cells = [
        ["column", "zero", "mean", "largest", *(f"{q} % quartile" for q in QUARTILES)],
        ["", "of rows", "ln(x + 1)", "ln(x + 1)", *("x within" for _ in QUARTILES)],
    ]
    for name, f in found["integers"].items():
        logs = [f"{f['log_mean']:.3f}", f"{f['log_largest']:.3f}"]
        buckets = [str(low) if low == high else f"{low}-{high}" for low, high in f["quartile_buckets"]]
        cells.append([name, _percent(f["zero_share"]), *logs, *buckets])
    return [
        f"Integer columns, training split. Zero: {found['zero']}.",
        "x: the number in the record. Quartiles are exact to a power-of-two bucket.",
        *_aligned(cells),
    ]


def _category_lines(found: dict) -> list[str]:
    cells = [
        ["column", "table size", "in train", f"id {found['rare_id']}", *(f"top {n}" for n in TOPS), "not in train"],
        ["", "ids", "ids", "of rows", *("of rows" for _ in TOPS), "of test rows"],
    ]
    for name, f in found["categories"].items():
        shares = [f["rare_id_share"], *(f[f"top_{n}_share"] for n in TOPS), f["unseen_test_share"]]
        cells.append([name, f"{f['table_size']:,}", f"{f['ids_in_train']:,}", *map(_percent, shares)])
    return [
        f"Category columns, training split. Id {found['rare_id']}: {found['rare']}.",
        f"Top {', '.join(map(str, TOPS))}: the most popular ids, id {found['rare_id']} among them.",
        *_aligned(cells),
    ]


def table(found: dict) -> str:
    """What `inspect` found as aligned text; no line but the folder's path is longer than 120 characters."""
    parts = (_split_lines(found), _integer_lines(found), _category_lines(found))
    return "\n\n".join("\n".join(lines) for lines in ([found["set"]], *parts))


def _plot_label_rates(axes, found: dict) -> None:
    places = 100 * (np.arange(RUNS) + 0.5) / RUNS
    for i, (split, figures) in enumerate(found["splits"].items()):
        rates = np.array(figures["label_rate_of_runs"], float)
        # Two standard errors, so that noise is not taken for drift.
        spread = 2 * np.sqrt(rates * (1 - rates) / max(1, figures["rows"] / RUNS))
        text = f"{split}: {figures['rows']:,} rows, {_percent(figures['label_rate'])}"
        # Shifted by a little, or the bars of the splits hide one another.
        axes.errorbar(places + 0.5 * (i - 1), 100 * rates, 100 * spread, fmt="o-", ms=4, lw=1.2, capsize=3, label=text)
    axes.set(
        title=f"Label rate along the file ({found['order']})",
        xlabel=f"place in the split's file [% of rows, {RUNS} equal runs]",
        ylabel="label 1 [% of rows], ± 2 standard errors",
        xlim=(0, 100),
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(**BELOW, bbox_to_anchor=(0.5, -0.15))


def _plot_bars(axes, groups: dict[str, list[float]], names: list[str], stacked: bool = False) -> None:
    """Bars of each group's values over the columns' names, side by side or one on the other."""
    places = np.arange(len(names))
    bottom = np.zeros(len(names))
    width = 0.8 if stacked else 0.8 / len(groups)
    for i, (text, values) in enumerate(groups.items()):
        shift = 0 if stacked else (i - (len(groups) - 1) / 2) * width
        axes.bar(places + shift, values, width, bottom=bottom if stacked else 0, label=text, color=f"C{i}")
        bottom += values
    axes.set_xticks(places, names, fontsize=8)
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(**BELOW, bbox_to_anchor=(0.5, -0.08))


def plot(found: dict, path: Path) -> None:
    """Draw what `inspect` found as one PNG of 1600 x 1200 pixels. Raises OSError where `path` cannot be written."""
    # Imported here: a second that other callers need not wait for. Without pyplot, a PNG is always drawn by Agg.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), dpi=100, layout="constrained")
    figure.suptitle(f"Data set {found['set'][-100:]}")
    grid = figure.add_gridspec(3, 2)
    integers, categories = found["integers"], found["categories"]

    def shares_axes(row: int, column: int, title: str):
        return figure.add_subplot(grid[row, column], title=title, ylabel="share [% of rows]", ylim=(0, 100))

    def shares(columns: dict, key: str) -> np.ndarray:
        return np.array([100 * column[key] for column in columns.values()])

    _plot_label_rates(figure.add_subplot(grid[0, :]), found)
    zeros = {f"0: {found['zero']}": shares(integers, "zero_share")}
    _plot_bars(shares_axes(1, 0, "Zeros per integer column, training split"), zeros, list(integers))
    rare = {
        f"id {found['rare_id']}, of training rows": shares(categories, "rare_id_share"),
        "ids that the training split never shows, of test rows": shares(categories, "unseen_test_share"),
    }
    _plot_bars(shares_axes(1, 1, f"Id {found['rare_id']}: {found['rare']}"), rare, list(categories))
    first, ten, hundred = (shares(categories, f"top_{n}_share") for n in TOPS)
    tops = {"the most popular id": first, "the next 9": ten - first, "the next 90": hundred - ten}
    axes = shares_axes(2, 0, "Most popular ids per category column, training split")
    _plot_bars(axes, tops, list(categories), stacked=True)
    texts = {"table_size": "table size", "ids_in_train": "ids in the training split"}
    sizes = {texts[key]: [column[key] for column in categories.values()] for key in texts}
    axes = figure.add_subplot(grid[2, 1], title="Table sizes", yscale="log", ylabel="ids [number, log axis]")
    _plot_bars(axes, sizes, list(categories))
    axes.set_ylim(bottom=0.5)  # a table of one id would have a bar of no height
    figure.savefig(path, format="png")
