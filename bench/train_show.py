"""What `python -m bench train` measured, as a table for a terminal and as a plot."""

import sys
from pathlib import Path

from bench.machine import caption, describe
from bench.train_peers import GRAPH, OURS


def say(one: dict) -> None:
    """One measurement in a line, while the others are still to come."""
    rates = ", ".join(
        f"{name} {figures['samples_per_second']:,} (± {50 * figures['spread']:.0f} %)"
        for name, figures in one["results"].items()
    )
    print(f"{one['model_config']}, batch {one['batch_size']:,}, {one['precision']}: {rates}", file=sys.stderr)


def table(result: dict) -> None:
    """Everything measured, aligned, to stderr."""
    head = ["model", "batch", "precision", "who", "samples/s", "spread", "ours is", "of operations", "of bytes"]
    lines, parts = [head], [["us a sample", "", "", ""]]
    for one in result["measured"]:
        place = [one["model_config"], f"{one['batch_size']:,}", one["precision"]]
        fastest = max((OURS, GRAPH), key=lambda name: one["results"].get(name, {}).get("samples_per_second", 0))
        for name, figures in one["results"].items():
            shares = [f"{100 * one['share_of_limit'][key]:.0f} %" for key in ("operations", "bytes")]
            peer = one["times_peer"].get(name)
            last = [f"{peer:.2f} x", "", ""] if peer else ["", *shares] if name == fastest else ["", "", ""]
            speed = [f"{figures['samples_per_second']:,}", f"{100 * figures['spread']:.0f} %"]
            lines.append([*place, name, *speed, *last])
            shown = ", ".join(f"{part} {value:.2f}" for part, value in figures["microseconds_per_sample"].items())
            parts.append([*place, f"{name}: {shown}"])
        if one["embedding_rows"] < one["embedding_rows_asked"]:
            cut = f"{one['model_config']}: {one['embedding_rows']:,} of {one['embedding_rows_asked']:,} embedding rows"
            lines.append([f"  ({cut}, the largest tables cut)", *[""] * (len(head) - 1)])
    widths = [max(len(line[i]) for line in lines if not line[0].startswith("  (")) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=sys.stderr)
    print(file=sys.stderr)
    for line in parts:
        print("  ".join(line).rstrip(), file=sys.stderr)


def _plot_speed(axes, found: list[dict], title: str) -> None:
    markers = {"float32": "o-", "amp": "s--", "fp16": "^:"}
    names = list(dict.fromkeys(name for one in found for name in one["results"]))
    for i, name in enumerate(names):
        for precision, marker in markers.items():
            points = [one for one in found if one["precision"] == precision and name in one["results"]]
            if not points:
                continue
            sizes = [one["batch_size"] for one in points]
            rates = [one["results"][name]["samples_per_second"] for one in points]
            bars = [rate * one["results"][name]["spread"] / 2 for rate, one in zip(rates, points, strict=True)]
            axes.errorbar(sizes, rates, bars, fmt=marker, color=f"C{i}", capsize=3, label=f"{name}, {precision}")
    sizes = sorted({one["batch_size"] for one in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(title=title, xlabel="batch size", ylabel="samples/s, median and quartiles' distance")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _plot_parts(axes, found: list[dict]) -> None:
    texts = [f"{one['batch_size']:,}\n{one['precision']}" for one in found]
    times = [one["results"]["ours"]["microseconds_per_sample"] for one in found]
    parts, bottom = list(dict.fromkeys(part for some in times for part in some)), [0.0] * len(found)
    for i, part in enumerate(parts):
        heights = [some.get(part, 0.0) for some in times]
        axes.bar(range(len(found)), heights, 0.7, bottom=bottom, label=part, color=f"C{i}")
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for i, one in enumerate(found):
        limit = 1e6 / one["limits_samples_per_second"]["operations"]
        axes.hlines(limit, i - 0.45, i + 0.45, color="black", label="limit by operations" if i == 0 else None)
    axes.set_xticks(range(len(found)), texts, fontsize=8)
    axes.set(title="Where our time goes", ylabel="µs a sample")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def plot(result: dict, path: Path) -> None:
    """Speed over batch size, and time per part, for every configuration. Raises OSError where `path` cannot be
    written."""
    # Imported here: a second that other callers need not wait for. Without pyplot, a PNG is always drawn by Agg.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one["model_config"] for one in result["measured"]))
    figure = Figure(figsize=(7 * len(names), 10), dpi=100, layout="constrained")
    figure.suptitle(f"Training step on {caption(describe(), result['device'])}")
    rows = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        found = [one for one in result["measured"] if one["model_config"] == name]
        _plot_speed(rows[0][column], found, f"{name}, {found[0]['embedding_rows']:,} embedding rows")
        _plot_parts(rows[1][column], found)
    figure.savefig(path, format="png")
