"""The table that ends an encode."""

from gpu_etl.dataset.manifest import Manifest
from gpu_etl.pipeline import Report
from gpu_etl.schema import COLUMN_NAMES, FIRST_SPARSE

PER_LINE = 4


def summary(made: Manifest, report: Report) -> str:
    """Rows and what was dropped, distinct values per column and the ids they got, memory, time by stage."""
    lines = ["", f"rows       {'  '.join(f'{split} {rows:,}' for split, rows in made.rows.items())}"]
    for source in made.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items())
        line = f"  {source['file']}: {source['rows']:,} rows, {source['clicks']:,} clicks"
        lines.append(line + (f"; left out: {dropped}" if dropped else ""))
    lines.append(f"ids        {sum(made.table_sizes):,} of {sum(report.distinct):,} distinct values")
    names = COLUMN_NAMES[FIRST_SPARSE:]
    cells = [
        f"{name:>4} {ids:>11,} of {distinct:>11,}"
        for name, ids, distinct in zip(names, made.table_sizes, report.distinct, strict=False)
    ]
    lines += ["".join(cells[i : i + PER_LINE]) for i in range(0, len(cells), PER_LINE)]
    peak, dictionaries = report.peak_bytes / 1e6, report.dictionary_bytes / 1e6
    device = f"; {report.device_bytes / 1e6:,.0f} MB of the GPU's" if report.device_bytes else ""
    lines.append(f"memory     {peak:,.0f} MB at the peak{device}, {dictionaries:,.0f} MB of it dictionaries")
    stages = "  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    lines.append(f"time       {stages}" + ("  (of the run that went on)" if report.resumed else ""))
    return "\n".join(lines)
