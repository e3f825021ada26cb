"""What inspect says of a data set, held against slow plain Python over its records."""

import json
import math
import shutil
import struct
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gpu_etl import inspect as inspection
from gpu_etl.errors import DataError
from gpu_etl.inspect import inspect
from gpu_etl.inspect_show import plot, table
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import PRESETS
from tests import reference
from tests.reference import log_dense

SPLITS = ("train", "test", "val")
WORDS = {"set", "days", "missing_share", "zero", "rare_id", "rare", "order", "splits", "integers", "categories"}


@pytest.fixture(scope="module", params=["count", "mlperf"])
def folder(request, day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings(preset=PRESETS[request.param], shuffle=request.param == "count"))
    return out


@pytest.fixture
def foreign(folder, tmp_path):
    """The same data set as another tool leaves it: no manifest."""
    out = tmp_path / "foreign"
    shutil.copytree(folder, out)
    (out / "manifest.json").unlink()
    return out


def read(folder, split):
    data = (folder / f"terabyte_processed_{split}.bin").read_bytes()
    return [list(row) for row in struct.iter_unpack("<40i", data)]


def slow_integers(values):
    def bucket(x):
        low, high = (0, 0) if x == 0 else (1, 1)
        while high < x:
            low, high = 2 * low, 2 * high + 1
        return [low, high]

    logs, ordered = [log_dense(x) for x in values], sorted(values)
    return {
        "zero_share": values.count(0) / len(values),
        "log_mean": math.fsum(logs) / len(values),
        "log_largest": max(logs),
        "quartile_buckets": [bucket(ordered[math.ceil(q * len(values) / 4) - 1]) for q in (1, 2, 3)],
    }


def slow_categories(train, test, size):
    counts = Counter(train)
    shares = {f"top_{n}_share": sum(c for _, c in counts.most_common(n)) / len(train) for n in (1, 10, 100)}
    return {
        "table_size": size,
        "ids_in_train": len(counts),
        "rare_id_share": counts[0] / len(train),
        **shares,
        "unseen_test_share": sum(key not in counts for key in test) / len(test),
    }


def slow_runs(labels):
    edges = [len(labels) * i // 20 for i in range(21)]
    runs = [labels[a:b] for a, b in pairwise(edges)]
    return [sum(run) / len(run) if run else None for run in runs]


def check(found, folder, sizes):
    records = {split: read(folder, split) for split in SPLITS}
    assert set(found) == WORDS and list(found["splits"]) == list(SPLITS)
    for split, rows in records.items():
        labels = [row[0] for row in rows]
        expected = {"rows": len(rows), "label_rate": sum(labels) / len(rows), "label_rate_of_runs": slow_runs(labels)}
        assert found["splits"][split] == expected
    assert list(found["integers"]) == [f"I{i}" for i in range(1, 14)]
    for column, figures in enumerate(found["integers"].values(), 1):
        expected = slow_integers([row[column] for row in records["train"]])
        buckets = expected.pop("quartile_buckets")
        assert figures.pop("quartile_buckets") == buckets
        assert figures == pytest.approx(expected, rel=1e-12)
    assert list(found["categories"]) == [f"C{i}" for i in range(1, 27)]
    for column, (figures, size) in enumerate(zip(found["categories"].values(), sizes, strict=True), 14):
        train, test = ([row[column] for row in records[split]] for split in ("train", "test"))
        assert figures == slow_categories(train, test, size)


# The splits have 801, 126 and 125 rows: blocks of one row, of odd ends, of exactly a split, and one for everything.
@pytest.mark.parametrize("block_rows", [1, 63, 100, 126, 801, 10_000])
def test_every_figure_at_every_block_boundary(folder, monkeypatch, block_rows):
    monkeypatch.setattr(inspection, "BLOCK_ROWS", block_rows)
    steps = []
    found = json.loads(json.dumps(inspect(folder, steps.append)))
    assert sum(steps) == 801 + 251 and max(steps) == min(block_rows, 801)
    check(found, folder, json.loads((folder / "manifest.json").read_text())["table_sizes"])


def test_days_and_missing_shares_are_those_of_the_text(folder, foreign, day_files):
    found = inspect(folder)
    days = [reference.read_rows(path.read_bytes()) for path in day_files]
    expected = [
        {"file": path.name, "rows": len(rows), "label_rate": sum(row[0] for row in rows) / len(rows)}
        for path, rows in zip(day_files, days, strict=True)
    ]
    assert found["days"] == expected
    everything = [row for rows in days for row in rows]
    shares = [sum(row[column] is None for row in everything) / len(everything) for column in range(1, 40)]
    assert list(found["missing_share"].values()) == shares and max(shares) > 0.1
    assert all(f"{100 * day['label_rate']:.2f} %" in table(found) for day in expected)
    assert inspect(foreign)["days"] is inspect(foreign)["missing_share"] is None


@pytest.mark.parametrize(("form", "digits"), [("dist", 12), ("dle", 2)])
def test_split_forms_show_the_same_figures(day_files, tmp_path, form, digits):
    for kind in ("records", form):
        encode_days(day_files, tmp_path / kind, Settings(form=kind))
    whole, split = inspect(tmp_path / "records"), inspect(tmp_path / form)
    for key in ("days", "missing_share", "zero", "rare", "splits", "categories"):
        assert split[key] == whole[key]
    for name, figures in whole["integers"].items():
        for key in ("zero_share", "log_mean", "log_largest"):
            assert split["integers"][name][key] == pytest.approx(figures[key], rel=10.0**-digits), (name, key)


@pytest.mark.parametrize("block_rows", [7, 10_000])
def test_without_a_manifest_tables_are_as_large_as_their_largest_id(foreign, monkeypatch, block_rows):
    monkeypatch.setattr(inspection, "BLOCK_ROWS", block_rows)
    records = [row for split in SPLITS for row in read(foreign, split)]
    found = inspect(foreign)
    assert found["rare"] == found["zero"] == "unknown without a manifest"
    check(found, foreign, [max(row[column] for row in records) + 1 for column in range(14, 40)])


def test_a_large_id_in_the_test_split_only_is_unseen_and_makes_the_table(foreign):
    path = foreign / "terabyte_processed_test.bin"
    records = np.fromfile(path, "<i4").reshape(-1, 40)
    records[5, 14] = 100_000
    records.tofile(path)
    found = inspect(foreign)
    assert found["categories"]["C1"]["table_size"] == 100_001
    ids = {row[14] for row in read(foreign, "train")}
    assert found["categories"]["C1"]["unseen_test_share"] == sum(row[14] not in ids for row in records.tolist()) / 126


@pytest.mark.parametrize("folder", ["count"], indirect=True)
def test_without_a_manifest_an_id_costs_the_same_however_large_it_is(foreign, folder):
    path = foreign / "terabyte_processed_train.bin"
    records = np.fromfile(path, np.int32).reshape(-1, 40)
    records[:, 14:] += 2**31 - 1 - records[:, 14:].max(0)
    records.tofile(path)
    tracemalloc.start()
    try:
        found = inspect(foreign)["categories"]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    known = inspect(folder)["categories"]
    for name in found:
        assert found[name]["table_size"] == 2**31 and found[name]["unseen_test_share"] == 1
        for figure in ("ids_in_train", "top_1_share", "top_10_share"):
            assert found[name][figure] == known[name][figure]


@pytest.mark.parametrize("folder", ["count"], indirect=True)
def test_a_split_of_fewer_rows_than_runs(foreign, tmp_path):
    path = foreign / "terabyte_processed_val.bin"
    path.write_bytes(path.read_bytes()[: 7 * 160])
    found = inspect(foreign)
    rates = found["splits"]["val"]["label_rate_of_runs"]
    assert rates == slow_runs([row[0] for row in read(foreign, "val")]) and rates.count(None) == 13
    path.unlink()
    assert list(inspect(foreign)["splits"]) == ["train", "test"]
    assert sum(line.endswith(" -") for line in table(found).splitlines()) == 13
    plot(found, tmp_path / "short.png")


def words(folder, change):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    fields["settings"]["preset"].update(change)
    path.write_text(json.dumps(fields))
    found = inspect(folder)
    return found["zero"], found["rare_id"], found["rare"]


def test_the_settings_say_what_numbers_mean(day_files, tmp_path):
    encode_days(day_files, tmp_path, Settings())
    merged = "missing, negative and real zeros, merged in the record"
    assert words(tmp_path, {}) == (merged, 0, "values seen fewer than 10 times, missing values")
    rare = "values beyond 1,000 ids, missing values"
    assert words(tmp_path, {"max_table_size": 1000, "min_count": 1, "dense": "plus2"}) == (
        "missing and below -1, merged in the record", 0, rare
    )  # fmt: skip
    changes = {"max_table_size": 0, "first_id": 2, "rare_id": 1, "missing_is_zero": True, "dense": "min"}
    assert words(tmp_path, changes) == ("none, the smallest number of a day is 1", 1, "no value")
    ids = [row[14] for row in read(tmp_path, "train")]
    assert inspect(tmp_path)["categories"]["C1"]["rare_id_share"] == ids.count(1) / len(ids)
    assert words(tmp_path, {"first_id": 0, "rare_id": 0})[1:] == (0, "an ordinary value, the first")
    assert inspect(tmp_path)["order"] == "training rows are shuffled"


def test_table_shows_every_column_and_figure(folder):
    found = inspect(folder)
    text = table(found)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    for name, figures in found["integers"].items():
        assert f"{100 * figures['zero_share']:.2f} %" in lines[name] and f"{figures['log_mean']:.3f}" in lines[name]
        assert all(str(bound) in lines[name] for bucket in figures["quartile_buckets"] for bound in bucket)
    for name, figures in found["categories"].items():
        shares = [f"{100 * value:.2f} %" for key, value in figures.items() if key.endswith("_share")]
        assert all(share in lines[name] for share in shares) and f"{figures['ids_in_train']:,}" in lines[name]
    assert all(f"{100 * f['label_rate']:.2f} %" in lines["label"] for f in found["splits"].values())
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_table_stays_narrow_at_official_sizes(folder):
    found = inspect(folder)
    for figures in found["categories"].values():
        figures |= {"table_size": 39_979_771, "ids_in_train": 39_979_771, "top_100_share": 1.0}
    for figures in found["integers"].values():
        figures |= {"zero_share": 1.0, "quartile_buckets": [[2**30, 2**31 - 1]] * 3}
    for figures in found["splits"].values():
        figures["rows"] = 4_195_197_692
    assert max(map(len, table(found).splitlines()[1:])) <= 120


@pytest.mark.parametrize("folder", ["count"], indirect=True)
def test_plot_is_a_png_of_the_promised_size(folder, tmp_path):
    plot(inspect(folder), tmp_path / "set")
    head = (tmp_path / "set").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", head[16:]) == (1600, 1200)
    with pytest.raises(OSError):
        plot(inspect(folder), tmp_path / "nowhere" / "set.png")


@pytest.mark.parametrize(("column", "value", "message"), [(0, 2, "label"), (3, -1, "I3"), (16, -5, "C3")])
def test_damaged_records_are_named(foreign, column, value, message):
    path = foreign / "terabyte_processed_test.bin"
    records = np.fromfile(path, "<i4").reshape(-1, 40)
    records[5, column] = value
    records.tofile(path)
    with pytest.raises(DataError, match=f"row 6, column {message}: expected 0 to .*, got {value}"):
        inspect(foreign)
    with pytest.raises(DataError, match="no data set"):
        inspect(foreign / "nowhere")
