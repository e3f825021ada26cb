"""The peer of bench/etl.py: read_csv, value_counts, join, write records, all in memory, as one would with Polars.

    python -m bench.polars_peer day_0 day_1 day_2 --out all.bin

Same ids as the count preset: by (-count, value) from 1 on, values seen fewer than 10 times and missing ones 0.
"""

import argparse
import json

import numpy as np
import polars as pl

from gpu_etl.schema import COLUMN_NAMES, DENSE, FIRST_DENSE, FIRST_SPARSE

MIN_COUNT = 10


def encode(paths: list[str]) -> np.ndarray:
    """Records int32 [n, 40] of plain text days, in file order."""
    dense, sparse = COLUMN_NAMES[FIRST_DENSE:FIRST_SPARSE], COLUMN_NAMES[FIRST_SPARSE:]
    types = {name: pl.Int32 for name in COLUMN_NAMES[:FIRST_SPARSE]} | {name: pl.String for name in sparse}
    frame = pl.concat(pl.read_csv(path, separator="\t", has_header=False, schema=types) for path in paths)
    records = np.empty((len(frame), len(COLUMN_NAMES)), np.int32)
    records[:, 0] = frame["label"].to_numpy()
    for j, name in enumerate(dense):
        records[:, FIRST_DENSE + j] = frame[name].fill_null(0).clip(0).to_numpy()
    for c, name in enumerate(sparse):
        counts = frame[name].drop_nulls().value_counts(name="count").filter(pl.col("count") >= MIN_COUNT)
        ids = counts.sort(["count", name], descending=[True, False]).with_row_index("id", offset=1)
        joined = frame.select(name).join(ids, on=name, how="left", maintain_order="left")
        records[:, FIRST_DENSE + DENSE + c] = joined["id"].fill_null(0).to_numpy()
    return records


def main() -> None:
    """Encode and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="DAY")
    parser.add_argument("--out", required=True, metavar="FILE")
    args = parser.parse_args()
    records = encode(args.inputs)
    records.tofile(args.out)
    print(json.dumps({"rows": len(records)}, allow_nan=False))


if __name__ == "__main__":
    main()
