"""Raw days: text and Parquet held against tests/reference.py, damaged gzip, and files that open to much."""

import gzip
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.schema import COLUMN_NAMES
from tests.fuzz.case import DAYS, Case, WrongError
from tests.reference import encode_days, parse_row, write_rows


def _expected(days: list[list], preset: str, min_count: int) -> list[np.ndarray]:
    """Records int32 of train, test and val by the reference, of rows in file order."""
    records = [np.array(day, np.int32).reshape(-1, 40) for day in encode_days(days, preset, min_count=min_count)]
    half = (len(records[-1]) + (preset != "dle")) // 2
    first, second = records[-1][:half], records[-1][half:]
    test, val = (second, first) if preset == "torchrec" else (first, second)
    return [np.concatenate(records[:-1]), test, val]


def _hold(case: Case, out: Path, days: list[list], preset: str, min_count: int) -> None:
    for split, expected in zip(("train", "test", "val"), _expected(days, preset, min_count), strict=True):
        found = np.fromfile(out / f"terabyte_processed_{split}.bin", np.int32).reshape(-1, 40)
        if not np.array_equal(found, expected):
            raise WrongError(f"the {split} split is another than the reference's ({preset}, {len(expected)} rows)")


def _parsed(text: bytes) -> list:
    """Rows of a day as the reference reads them, None where one is bad. Blank lines at the end are none."""
    lines = text.split(b"\n")
    while lines and not lines[-1].removesuffix(b"\r"):
        lines.pop()
    return [parse_row(line)[0] for line in lines]


def text(case: Case) -> None:
    """Raw text, whole and in gzip, held against the reference."""
    chance, days = case.chance, []
    for path in case.days:
        data = write_rows(seed=chance.randrange(10**9), rows=chance.randint(2, 60))
        if chance.random() < 0.3:
            data = data.replace(b"\n", b"\r\n")
        if chance.random() < 0.3:
            data = data.removesuffix(b"\n")
        if chance.random() < 0.5:
            data = case.mutate(data, 3)
        days.append(data)
        Path(path).write_bytes(gzip.compress(data, 1) if chance.random() < 0.2 else data)
    preset, min_count = chance.choice(["mlperf", "count", "torchrec", "dle"]), chance.choice([0, 1, 2, 5])
    min_count *= preset != "mlperf"
    skip = chance.random() < 0.5
    out = case.folder / "out"
    status, said = case.gpu_etl(
        "encode", *case.days, "--out", out, "--preset", preset, "--min-count", min_count, "--no-shuffle",
        "--slab-bytes", chance.choice([1024, 5000, 20_000, 1 << 20]), "--threads", chance.choice([1, 2]),
        "--bad-rows", "skip" if skip else "error",
    )  # fmt: skip
    rows = [_parsed(day) for day in days]
    kept = [[row for row in day if row] for day in rows]
    bad = sum(map(len, rows)) - sum(map(len, kept))
    if status == 0:
        if bad and not skip:
            raise WrongError(f"{bad} bad rows were not noticed")
        _hold(case, out, kept, preset, min_count)
        return
    # What begins like another kind of file may be refused as such, and days may be left with too few rows.
    enough = all(day and day[0] for day in rows) and len(kept[-1]) > 1
    if enough and (not bad or skip):
        raise WrongError(f"{sum(map(len, kept))} rows, {bad} of them bad, were refused: {said[-300:]}")


def _column(chance: random.Random, values: list, c: int) -> pa.Array:
    """A column of a row group, in one of the types that hold such values."""
    if c >= 14 and chance.random() < 0.5:
        found = pa.array([None if value is None else f"{value:08x}" for value in values], pa.string())
        return found.dictionary_encode() if chance.random() < 0.4 else found
    return pa.array(values, chance.choice([pa.int64(), pa.uint32() if c >= 14 or c == 0 else pa.int32()]))


def parquet(case: Case) -> None:
    """Parquet days of several types and encodings, some damaged; whole ones are held against the reference."""
    chance, days, damaged, paths = case.chance, [], False, []
    for day in range(DAYS):
        rows = [parse_row(line)[0] for line in write_rows(chance.randrange(10**9), chance.randint(2, 60)).splitlines()]
        columns = {name: _column(chance, [row[c] for row in rows], c) for c, name in enumerate(COLUMN_NAMES)}
        path = case.folder / "days" / f"day_{day}.parquet"
        pq.write_table(
            pa.table(columns), path, row_group_size=17, compression=chance.choice(["snappy", "zstd", "none", "gzip"]),
            use_dictionary=chance.random() < 0.5, data_page_version=chance.choice(["1.0", "2.0"]),
        )  # fmt: skip
        if chance.random() < 0.4:
            whole = path.read_bytes()
            path.write_bytes(case.mutate(whole, 3))
            damaged |= path.read_bytes() != whole
        days.append(rows)
        paths.append(path)
    out = case.folder / "out"
    status, said = case.gpu_etl("encode", *paths, "--out", out, "--preset", "mlperf", "--no-shuffle")
    if status == 0 and not damaged:
        _hold(case, out, days, "mlperf", 0)
    elif status and not damaged:
        raise WrongError(f"whole Parquet files were refused: {said[-300:]}")


def squeezed(case: Case) -> None:
    """Damaged gzip files: an error, or what they hold."""
    data = write_rows(case.chance.randrange(10**9), 50)
    path = Path(case.days[1]).with_suffix(".gz")
    path.write_bytes(case.mutate(gzip.compress(data), 2))
    case.gpu_etl("encode", case.days[0], path, case.days[2], "--out", case.folder / "out")


def bombs(case: Case) -> None:
    """Small files that open to much: long strings once in a Parquet dictionary, newlines and endless rows in gzip."""
    chance, path = case.chance, Path(case.days[1])
    if chance.random() < 0.5:
        rows = chance.choice([5_000, 20_000])
        places = pa.array(np.zeros(rows, np.int32))
        texts = [b"a" * chance.choice([9, 10**3, 10**5, 10**6]), b"1" * 10**6]
        columns = {name: pa.array(np.zeros(rows, np.int64)) for name in COLUMN_NAMES}
        for name in chance.sample(COLUMN_NAMES[14:], chance.choice([1, 3])):
            columns[name] = pa.DictionaryArray.from_arrays(places, pa.array([chance.choice(texts).decode()]))
        path = path.with_suffix(".parquet")
        pq.write_table(pa.table(columns), path, compression=chance.choice(["zstd", "gzip"]))
    else:
        size = chance.choice([1 << 20, 8 << 20, 32 << 20])
        line = chance.choice([b"\n", b"\t", b"0", b"\t\n", write_rows(1, 1).replace(b"\n", b"")])
        path = path.with_suffix(".gz")
        path.write_bytes(gzip.compress(line * (size // len(line)), 1))
    rules = chance.choice([[], ["--bad-rows", "skip", "--max-bad-rows", 10**9]])
    case.gpu_etl("encode", case.days[0], path, case.days[2], "--out", case.folder / "out", *rules)
