"""Every preset's rules against slow references, sampling, splits, and rows that are left out."""

import json

import numpy as np
import pytest

from gpu_etl.__main__ import main
from gpu_etl.common.errors import DataError
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import PRESETS, choose_preset, split_file
from tests import reference


def all_records(folder):
    return np.concatenate(
        [np.fromfile(folder / split_file(split), np.int32).reshape(-1, 40) for split in ("train", "test", "val")]
    )


def rows_of(day_files):
    return [reference.read_rows(path.read_bytes()) for path in day_files]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("rules", [{}, {"min_count": 4}, {"max_index_range": 60}, {"max_table_size": 9}], ids=str)
def test_every_preset_is_the_slow_reference(day_files, tmp_path, preset, rules):
    if PRESETS[preset].first_id == 0 and ("min_count" in rules or "max_table_size" in rules):
        pytest.skip("this preset has no id for rare values")
    no_sampling = {"sample": 1.0, "sample_last": 1.0, "drop_negatives": 0.0}
    chosen = choose_preset(preset, **rules, **no_sampling)
    made, _ = encode_days(day_files, tmp_path / "set", Settings(preset=chosen, shuffle=False))
    name = "mlperf" if preset == "deepspark" else preset
    least = {"dle": 15, "count": 10}.get(preset, 0)
    expected = reference.encode_days(rows_of(day_files), name, **{"min_count": least} | rules)
    train, last = sum(map(len, expected[:-1])), len(expected[-1])
    half = (last + 1) // 2 if preset != "dle" else last // 2
    flat = [record for day in expected for record in day]
    first, second = flat[train : train + half], flat[train + half :]
    if preset == "torchrec":
        first, second = second, first
    assert all_records(tmp_path / "set").tolist() == flat[:train] + first + second
    assert made.rows == {"train": train, "test": len(first), "val": len(second)}
    assert made.settings["preset"]["name"] == preset


def test_flags_replace_rules_and_the_manifest_tells(day_files, tmp_path, capsys):
    words = (
        "--preset dle --order first --first-id 3 --rare-id 2 --missing-is-zero --min-count 3 --dense clamp "
        "--last-day val-ceil"
    )
    assert main(["encode", *map(str, day_files), "--out", str(tmp_path), "--no-shuffle", *words.split()]) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["preset"] == {
        "name": "dle", "order": "first", "first_id": 3, "missing_is_zero": True, "min_count": 3, "rare_id": 2,
        "max_index_range": 0, "max_table_size": 0, "dense": "clamp", "last_day": "val-ceil", "sample": 1.0,
        "sample_last": 1.0, "drop_negatives": 0.0,
    }  # fmt: skip


@pytest.mark.slow
def test_sampling_keeps_its_shares_whatever_the_slabs(tmp_path):
    days = [tmp_path / f"day_{day}" for day in range(3)]
    for day, path in enumerate(days):
        path.write_bytes(reference.write_rows(seed=day, rows=4000))
    rules = {"sample": 0.5, "sample_last": 0.2, "drop_negatives": 0.75}
    found = []
    for name, slab_bytes, seed in (("a", 1 << 20, 1), ("b", 3000, 1), ("c", 1 << 20, 2)):
        settings = Settings(preset=choose_preset("deepspark", **rules), shuffle=False, slab_bytes=slab_bytes, seed=seed)
        made, _ = encode_days(days, tmp_path / name, settings)
        found.append(all_records(tmp_path / name).tolist())
    assert found[0] == found[1] != found[2]
    for day, source in enumerate(made.sources):
        share = rules["sample_last"] if day == 2 else rules["sample"]
        assert source["rows"] == 4000
        assert source["dropped"]["sampled"] == pytest.approx(4000 * (1 - share), abs=130)
        assert source["dropped"]["negatives"] == pytest.approx(2000 * share * 0.75, abs=130)
    kept = sum(made.rows.values())
    assert kept == 12_000 - sum(sum(source["dropped"].values()) for source in made.sources) == len(found[2])
    labels = [record[0] for record in found[2]]
    assert np.mean(labels) == pytest.approx(0.8, abs=0.04)  # half of the rows are positive, three in four negatives go


def test_sampling_needs_to_know_the_last_day(day_files, tmp_path):
    with pytest.raises(DataError, match="give both the same value"):
        encode_days(day_files[:1], tmp_path / "set", Settings(preset=PRESETS["deepspark"], days=3))


@pytest.mark.parametrize(
    ("fractions", "rows"), [((0.5, 0.25, 0.25), (526, 263, 263)), ((0.9, 0.1, 0.0), (947, 105, 0))]
)
def test_fractions(day_files, tmp_path, fractions, rows):
    made, _ = encode_days(day_files, tmp_path / "set", Settings(fractions=fractions, shuffle=False))
    assert tuple(made.rows[split] for split in ("train", "test", "val")) == rows
    encode_days(day_files, tmp_path / "days", Settings(shuffle=False))
    assert all_records(tmp_path / "set").tolist() == all_records(tmp_path / "days").tolist()


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2), (1.0, 0.0, 0.0)])
def test_fractions_that_cannot_be(day_files, tmp_path, fractions):
    with pytest.raises(DataError, match="--fractions"):
        encode_days(day_files, tmp_path / "set", Settings(fractions=fractions))
    assert not (tmp_path / "set").exists()


GOOD = b"1" + b"\t5" * 13 + b"\tabcdef01" * 26
BAD = {
    "wrong number of fields": GOOD + b"\t1",
    "bad label": b"2" + GOOD[1:],
    "bad integer": GOOD.replace(b"\t5", b"\t5.0", 1),
    "out of range": GOOD.replace(b"\t5", b"\t99999999999", 1),
    "bad hex digits": GOOD.replace(b"abcdef01", b"abcdefg1", 1),
}


@pytest.fixture
def spoiled(tmp_path):
    path = tmp_path / "spoiled"
    lines = reference.write_rows(seed=8, rows=200).splitlines()
    for place, line in zip((0, 50, 51, 100, 204), BAD.values(), strict=True):
        lines.insert(place, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    clean = tmp_path / "clean"
    clean.write_bytes(reference.write_rows(seed=8, rows=200))
    return path, clean


@pytest.mark.parametrize("slab_bytes", [2000, 1 << 20])
def test_bad_rows_are_left_out_and_counted(day_files, spoiled, tmp_path, capsys, slab_bytes):
    skip = Settings(bad_rows="skip", shuffle=False, slab_bytes=slab_bytes)
    made, _ = encode_days([spoiled[0], day_files[0]], tmp_path / "skipped", skip)
    assert made.sources[0]["rows"] == 205 and made.sources[0]["dropped"] == dict.fromkeys(sorted(BAD), 1)
    assert made.sources[1]["dropped"] == {}
    encode_days([spoiled[1], day_files[0]], tmp_path / "clean_set", Settings(shuffle=False))
    assert all_records(tmp_path / "skipped").tolist() == all_records(tmp_path / "clean_set").tolist()
    words = capsys.readouterr().err
    assert "spoiled: row 1: expected 40 tab-separated fields, got 41" in words
    assert "spoiled: row 205: column C1: expected up to 8 hex digits" in words


def test_too_many_bad_rows_are_an_error_all_the_same(day_files, spoiled, tmp_path):
    settings = Settings(bad_rows="skip", max_bad_rows=4)
    with pytest.raises(DataError, match=r"row 205: .* More than --max-bad-rows 4"):
        encode_days([spoiled[0], day_files[0]], tmp_path / "set", settings)
    assert not (tmp_path / "set").exists()


def test_a_full_disk_is_told_before_the_start(day_files, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(DataError, match="free; choose another --out"):
        encode_days(day_files, tmp_path / "set", Settings())
