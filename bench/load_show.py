"""What bench/load.py measured, as tables for a terminal and as a plot."""

from pathlib import Path

from bench.machine import caption

BELOW = {"loc": "upper center", "ncols": 3, "frameon": False, "fontsize": 9}


def table(found: dict) -> str:
    """Loaders of one measurement, a line each."""
    where = "from disk" if found.get("cold") else "with the training step" if "steps" in found else "from page cache"
    lines = [f"batch {found['batch_size']:,}, {where}"]
    for name, figures in found["loaders"].items():
        if "data_wait_share" in figures:
            share, rate = 100 * figures["data_wait_share"], figures["samples_per_second"]
            lines.append(f"  {name:30} data wait share {share:6.2f} %, {rate:,} samples/s")
        else:
            rows, times = figures["million_rows_per_second"], figures["times_peer"]
            lines.append(f"  {name:30} {rows:9.3f} M rows/s {times:8.2f} times DataLoader on blocks")
    return "\n".join(lines)


def plot(result: dict, machine: dict, path: Path) -> None:
    """Draw all of it as one PNG of 1600 x 700 pixels. Raises OSError where `path` cannot be written."""
    # Imported here, as a second that other benchmarks need not wait for. Without pyplot, a PNG is always drawn by Agg.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    figure.suptitle(f"Criteo records to batches on {caption(machine, result['device'])}")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(result["page_cache"][0]["loaders"])
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for name in names:
        sizes = [found["batch_size"] for found in result["page_cache"]]
        rates = [found["loaders"][name]["million_rows_per_second"] for found in result["page_cache"]]
        left.plot(sizes, rates, "o-", label=name, color=colours[name])
        if name in result["disk"]["loaders"]:
            cold = result["disk"]["loaders"][name]["million_rows_per_second"]
            left.plot([result["disk"]["batch_size"]], [cold], "x", ms=9, mew=2, color=colours[name])
    limit = result["limits_million_rows_per_second"]["page_cache_to_memory"]
    left.axhline(limit, ls=":", color="grey", label="one thread copies the bytes, no more")
    left.set(
        title="Loader alone, page cache (x: from disk)", xlabel="batch size [rows, log axis]", xscale="log",
        ylabel="throughput [million rows/s, log axis]", yscale="log",
    )  # fmt: skip
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(**BELOW, bbox_to_anchor=(0.5, -0.1))
    training = result["training"]
    shares = {name: 100 * training["loaders"][name]["data_wait_share"] for name in names if name in training["loaders"]}
    bars = right.barh(list(shares), list(shares.values()), color=[colours[name] for name in shares])
    right.bar_label(bars, fmt="%.2f %%", padding=3)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(
        title=f"With the training step, {result['model_config']}, batch {training['batch_size']:,}",
        xlabel="data wait share [% of the time of a step]",
    )
    right.grid(axis="x", alpha=0.3)
    right.set_axisbelow(True)
    figure.savefig(path, format="png")
