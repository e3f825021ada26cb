"""What inspect.py found, as a table for a terminal and as a plot."""

from pathlib import Path

import numpy as np

from gpu_etl.commands.inspect import QUARTILES, RUNS, TOPS

BELOW = {"loc": "upper center", "ncols": 3, "frameon": False}


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


def _day_lines(found: dict) -> list[str]:
    if found["days"] is None:
        return []
    cells = [["day", "rows", "label rate"]]
    cells += [[day["file"][-60:], f"{day['rows']:,}", _percent(day["label_rate"])] for day in found["days"]]
    return ["Day files.", *_aligned(cells)]


def _missing(found: dict, column: str) -> str:
    return _percent(found["missing_share"] and found["missing_share"][column])


def _integer_lines(found: dict) -> list[str]:
    cells = [
        ["column", "missing", "zero", "mean", "largest", *(f"{q} % quartile" for q in QUARTILES)],
        ["", "of all", "of rows", "ln(x + 1)", "ln(x + 1)", *("x within" for _ in QUARTILES)],
    ]
    for name, f in found["integers"].items():
        logs = [f"{f['log_mean']:.3f}", f"{f['log_largest']:.3f}"]
        buckets = [str(low) if low == high else f"{low}-{high}" for low, high in f["quartile_buckets"]]
        cells.append([name, _missing(found, name), _percent(f["zero_share"]), *logs, *buckets])
    return [
        f"Integer columns, training split. Zero: {found['zero']}.",
        "Missing: of the rows of all days. x: the number in the record. Quartiles are exact to a power-of-two bucket.",
        *_aligned(cells),
    ]


def _category_lines(found: dict) -> list[str]:
    cells = [
        ["column", "missing", "table", "in train", f"id {found['rare_id']}", *(f"top {n}" for n in TOPS), "unseen"],
        ["", "of all", "ids", "ids", "of rows", *("of rows" for _ in TOPS), "of test rows"],
    ]
    for name, f in found["categories"].items():
        shares = [f["rare_id_share"], *(f[f"top_{n}_share"] for n in TOPS), f["unseen_test_share"]]
        sizes = [f"{f['table_size']:,}", f"{f['ids_in_train']:,}"]
        cells.append([name, _missing(found, name), *sizes, *map(_percent, shares)])
    return [
        f"Category columns, training split. Id {found['rare_id']}: {found['rare']}.",
        f"Top {', '.join(map(str, TOPS))}: the most popular ids, id {found['rare_id']} among them.",
        "Missing: of the rows of all days. Unseen: ids that the training split never shows.",
        *_aligned(cells),
    ]


def table(found: dict) -> str:
    """What `inspect` found as aligned text; no line but the folder's path is longer than 120 characters."""
    parts = (_day_lines(found), _split_lines(found), _integer_lines(found), _category_lines(found))
    return "\n\n".join("\n".join(lines) for lines in ([found["set"]], *parts) if lines)


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


def _plot_days(axes, days: list[dict]) -> None:
    rates = [100 * day["label_rate"] if day["rows"] else np.nan for day in days]
    axes.bar(range(len(days)), rates, color="C0")
    axes.set_xticks(range(len(days)), [day["file"][-12:] for day in days], fontsize=8, rotation=90 * (len(days) > 4))
    axes.set(title="Label rate per day file", ylabel="label 1 [% of rows kept]")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


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

    if found["days"] is None:
        _plot_label_rates(figure.add_subplot(grid[0, :]), found)
    else:
        top = grid[0, :].subgridspec(1, 2, width_ratios=(3, 1))
        _plot_label_rates(figure.add_subplot(top[0]), found)
        _plot_days(figure.add_subplot(top[1]), found["days"])
    missing = found["missing_share"] or {}
    unmerged = {"missing, of all days' rows": [100 * missing[name] for name in integers]} if missing else {}
    zeros = unmerged | {f"0: {found['zero']}": shares(integers, "zero_share")}
    _plot_bars(shares_axes(1, 0, "Zeros per integer column, training split"), zeros, list(integers))
    unmerged = {"missing, of all days' rows": [100 * missing[name] for name in categories]} if missing else {}
    rare = unmerged | {
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
