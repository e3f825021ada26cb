"""Synthetic rows of every kind, for the checks."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from gpu_etl.doctor.specification import write_rows
from gpu_etl.raw.synthetic import write_days

DISTINCT = 1000  # rows that are drawn one by one; more are these in another order
BAD = [b"", b"0", b"2" + b"\t" * 39, b"1" + b"\tx" * 39, b"1" + b"\t99999999999" * 13 + b"\t" * 26, b"1\r", b"\xff" * 9]


def ragged(rows: int, seed: int) -> bytes:
    """Rows of few distinct values with gaps, extremes and values below eight digits."""
    lines = write_rows(seed, min(rows, DISTINCT)).splitlines()
    order = np.random.default_rng(seed).permutation(max(rows, len(lines)))[:rows] % len(lines)
    return b"".join(lines[i] + b"\n" for i in order)


@cache
def learnable(rows: int, seed: int) -> bytes:
    """Rows with as many distinct values as Criteo's have."""
    with tempfile.TemporaryDirectory() as folder:
        write_days(Path(folder), rows=max(rows, 20), days=2, seed=seed, compress=False)
        text = b"".join((Path(folder) / f"day_{day}").read_bytes() for day in range(2))
    return b"".join(text.splitlines(keepends=True)[:rows])


def texts(rows: int) -> dict[str, bytes]:
    """Slabs of text by kind; the large ones have `rows` rows."""
    plain = ragged(rows, 3)
    row = plain.splitlines()[0]
    some = plain.splitlines()[:DISTINCT]
    mixed = [line for i, good in enumerate(some) for line in ((good, BAD[i % len(BAD)]) if i % 9 == 0 else (good,))]
    return {
        "ragged": plain, "another seed": ragged(rows, 4), "many values": learnable(rows, 5),
        "crlf": plain.replace(b"\n", b"\r\n"), "no last newline": plain[:-1], "one row": row, "nothing": b"",
        "equal rows": (row + b"\n") * min(rows, 2 * DISTINCT), "all missing": (b"0" + b"\t" * 39 + b"\n") * rows,
        "extremes": b"1" + b"\t-2147483648" * 13 + b"\tffffffff" * 26 + b"\n0" + b"\t2147483647" * 13 + b"\t0" * 26,
        "bad rows": b"\n".join(mixed) + b"\n",
    }  # fmt: skip


def day_files(folder: Path, rows: int) -> list[Path]:
    """Three day files: of all kinds of rows, with many values, with CRLF."""
    all_missing = b"1" + b"\t" * 39 + b"\n"
    days = [ragged(rows, 6) + all_missing, learnable(rows, 7), ragged(rows // 2, 8).replace(b"\n", b"\r\n")]
    paths = [folder / f"day_{day}" for day in range(len(days))]
    for path, text in zip(paths, days, strict=True):
        path.write_bytes(text)
    return paths
