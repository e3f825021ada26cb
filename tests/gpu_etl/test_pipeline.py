"""Whole encodes, held against the reference preprocessing's golden files and tests/reference.py."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.commands.verify import verify
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError
from gpu_etl.dataset import manifest
from gpu_etl.passes import count as counting
from gpu_etl.passes.buckets import Buckets
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw import reader as extract
from gpu_etl.rows import splits
from gpu_etl.rows.numbered import group
from gpu_etl.rows.random_keys import keys_of, row_keys
from gpu_etl.schema import PRESETS, choose_preset, split_file
from tests import reference
from tests.conftest import ROOT

PLAIN = Settings(shuffle=False)


def records(folder, split):
    return np.fromfile(folder / split_file(split), np.int32).reshape(-1, 40)


def all_records(folder):
    return np.concatenate([records(folder, split) for split in ("train", "test", "val")])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("index_range", "golden"), [(0, ""), (1000, "_range1000")])
@pytest.mark.parametrize("packed", [False, True])
def test_mlperf_preset_is_bit_equal_to_the_reference_preprocessing(samples, tmp_path, index_range, golden, packed):
    lines = (samples / "criteo_terabyte_day0_5k.tsv").read_bytes().splitlines(keepends=True)
    days = [tmp_path / f"day_{day}" for day in range(3)]
    for path, (begin, end) in zip(days, ((0, 3000), (3000, 4001), (4001, 5000)), strict=True):
        text = b"".join(lines[begin:end])
        path.write_bytes(gzip.compress(text) if packed else text)
    settings = replace(PLAIN, preset=choose_preset("mlperf", max_index_range=index_range), slab_bytes=100_000)
    made, _ = encode_days(days, tmp_path / "set", settings)
    with np.load(samples / f"golden_mlperf_terabyte_5k{golden}.npz") as expected:
        days_expected = np.concatenate([expected[f"day_{day}"] for day in range(3)])
        np.testing.assert_array_equal(all_records(tmp_path / "set"), days_expected)
        assert made.table_sizes == expected["counts"].tolist()
    assert made.rows == {"train": 4001, "test": 500, "val": 499}


@pytest.mark.parametrize(
    ("preset", "min_count", "index_range"), [("mlperf", 0, 0), ("mlperf", 0, 77), ("count", 10, 0), ("count", 2, 500)]
)
def test_presets_are_those_of_the_slow_reference(day_files, tmp_path, preset, min_count, index_range):
    rules = {"min_count": min_count, "max_index_range": index_range}
    encode_days(day_files, tmp_path / "set", replace(PLAIN, preset=choose_preset(preset, **rules)))
    rows = reference.read_rows(b"".join(path.read_bytes() for path in day_files))
    (expected,) = reference.encode_days([rows], preset, **rules)
    assert all_records(tmp_path / "set").tolist() == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_bytes_do_not_depend_on_slabs_or_threads(day_files, tmp_path, shuffle):
    found = []
    for i, (slab_bytes, workers) in enumerate([(1 << 24, 0), (2000, 1), (30_011, 2)]):
        out = tmp_path / str(i)
        encode_days(day_files, out, Settings(shuffle=shuffle, slab_bytes=slab_bytes, threads=workers))
        found.append(digests(out))
    cpu.set_threads(0)
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == sorted(
        ["manifest.json", "vocabulary.npz"] + [split_file(split) for split in ("train", "test", "val")]
    )


@pytest.mark.parametrize("preset", ["mlperf", "torchrec", "count"])
def test_bytes_do_not_depend_on_days_being_read_side_by_side(day_files, tmp_path, monkeypatch, preset):
    settings = Settings(preset=PRESETS[preset], slab_bytes=4000)
    packed = [tmp_path / f"{path.name}.gz" for path in day_files]
    for path, day in zip(packed, day_files, strict=True):
        path.write_bytes(gzip.compress(day.read_bytes()))
    encode_days(packed, tmp_path / "one", settings)
    real = extract.read_day

    def late_first_day(source, day, *arguments, **more):
        for slab in real(source, day, *arguments, **more):
            if day == 0:
                time.sleep(0.01)  # so that later days come first
            yield slab

    monkeypatch.setattr(counting, "read_day", late_first_day)
    monkeypatch.setattr(cpu, "CORES_PER_READER", 1 / 3)
    days = []
    monkeypatch.setattr(counting.CountPass, "_end_day", lambda self, day, real=counting.CountPass._end_day: (
        days.append(day) or real(self, day)))  # fmt: skip
    encode_days(packed, tmp_path / "three", replace(settings, threads=1))
    assert days != sorted(days)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_bytes_do_not_depend_on_readers_of_one_file(day_files, tmp_path, monkeypatch, bad_rows):
    day = tmp_path / "day_0"
    day.write_bytes(day_files[0].read_bytes() + b"bad\n" * (bad_rows == "skip") + day_files[1].read_bytes())
    settings = Settings(preset=PRESETS["mlperf"], slab_bytes=3000, threads=1, bad_rows=bad_rows)
    encode_days([day, *day_files[2:]], tmp_path / "one", settings)
    monkeypatch.setattr(cpu, "CORES_PER_READER", 1 / 5)
    readers, real = set(), cpu.find_rows

    def find_rows(text):
        readers.add(threading.current_thread())
        time.sleep(0.001 * (len(text) % 7))  # so that later slabs are ready first
        return real(text)

    monkeypatch.setattr(cpu, "find_rows", find_rows)
    encode_days([day, *day_files[2:]], tmp_path / "five", settings)
    assert len(readers) >= 5
    assert digests(tmp_path / "one") == digests(tmp_path / "five")


def test_shuffle_permutes_training_rows_only(day_files, tmp_path):
    for name, settings in (("plain", PLAIN), ("a", Settings(seed=1)), ("b", Settings(seed=2)), ("c", Settings(seed=1))):
        encode_days(day_files, tmp_path / name, settings)
    plain, a, b = (records(tmp_path / name, "train") for name in ("plain", "a", "b"))
    assert sorted(map(tuple, plain)) == sorted(map(tuple, a)) == sorted(map(tuple, b))
    assert (plain != a).any(1).sum() > 700 and (a != b).any(1).sum() > 700
    assert digests(tmp_path / "a") == digests(tmp_path / "c")
    for split in ("test", "val"):
        np.testing.assert_array_equal(records(tmp_path / "plain", split), records(tmp_path / "a", split))


def test_shuffle_does_not_depend_on_its_buckets(tmp_path):
    rows = np.arange(5000 * 40, dtype=np.int32).reshape(-1, 40)
    orders = []
    for count, step in ((1, 5000), (17, 777), (90, 10)):
        buckets = Buckets(tmp_path, count, seed=3, kept=[0])
        for begin in reversed(range(0, len(rows), step)):  # any order will do
            buckets.add(*group(rows[begin : begin + step], begin, 3, count, ScratchBuffer()))
        whole = buckets.whole(0, [ScratchBuffer(), ScratchBuffer(), ScratchBuffer()])
        shuffled = [rows_["coded"][np.argsort(keys_of(3, rows_["row"]))] for rows_ in whole]
        orders.append(np.concatenate(shuffled)[:, 0] // 40)
        for bucket in range(count):
            buckets.remove(bucket)
        assert not list(tmp_path.iterdir())
    assert sorted(orders[0]) == list(range(5000))
    assert (orders[0] == orders[1]).all() and (orders[0] == orders[2]).all()


def test_shuffle_is_uniform():
    # Where row 0 and row 7 of 8 come to lie, over many seeds: chi-square with 7 degrees of freedom, 99.99 % quantile.
    seeds = 20_000
    places = np.array([np.argsort(np.argsort(row_keys(seed, 0, 8))) for seed in range(seeds)])
    for row in (0, 7):
        observed = np.bincount(places[:, row], minlength=8)
        assert ((observed - seeds / 8) ** 2 / (seeds / 8)).sum() < 29.9


def test_one_file_cut_into_days(day_files, tmp_path):
    whole = tmp_path / "train.txt"
    whole.write_bytes(b"".join(path.read_bytes() for path in day_files))
    made, _ = encode_days([whole], tmp_path / "set", replace(PLAIN, days=7))
    assert made.rows == {"train": 1052 - 150, "test": 75, "val": 75}
    encode_days(day_files, tmp_path / "three", PLAIN)
    np.testing.assert_array_equal(all_records(tmp_path / "set"), all_records(tmp_path / "three"))


@pytest.mark.parametrize(
    ("rows", "days", "expected"), [(20, 7, [3, 3, 3, 3, 3, 3, 2]), (21, 7, [3] * 7), (8, 3, [3, 3, 2])]
)
def test_equal_days(rows, days, expected):
    assert splits.equal_days(rows, days) == expected


@pytest.mark.parametrize(("last", "test", "val"), [(999, 500, 499), (2, 1, 1), (1, 1, 0)])
def test_last_day_is_halved(last, test, val):
    found = splits.by_last_day([10, 5, last], "test-ceil")
    assert found == {"train": (0, 15), "test": (15, 15 + test), "val": (15 + test, 15 + test + val)}


def test_manifest_tells_what_was_done_and_verify_holds_it_to_it(day_files, tmp_path):
    made, _ = encode_days(day_files, tmp_path, Settings(seed=9))
    assert manifest.Manifest.read(tmp_path) == made
    assert made.settings["preset"]["min_count"] == 10 and made.settings["seed"] == 9
    assert [source["rows"] for source in made.sources] == [500, 301, 251]
    assert verify(tmp_path)["rows"] == made.rows


def flip(folder, name="terabyte_processed_train.bin"):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def forge_an_id(folder):
    path = folder / "terabyte_processed_test.bin"
    data = np.fromfile(path, np.int32)
    data[40 * 3 + 20] = 10**6
    data.tofile(path)
    found = manifest.Manifest.read(folder)
    replace(found, files=found.files | {path.name: manifest.describe_file(path)}).write(folder)


def change_manifest(folder, **fields):
    path = folder / manifest.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def forge_id_maps(folder, **arrays):
    """Write other id maps, and tell the manifest; None: as many values, all of them one."""
    path = folder / "vocabulary.npz"
    with np.load(path) as found:
        changed = {name: np.zeros_like(found[name]) if array is None else array for name, array in arrays.items()}
        np.savez(path, **dict(found) | changed)
    files = manifest.Manifest.read(folder).files
    change_manifest(folder, files=files | {path.name: manifest.describe_file(path)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "changed or damaged"),
        (lambda folder: flip(folder, "vocabulary.npz"), "changed or damaged"),
        (lambda folder: (folder / "terabyte_processed_val.bin").unlink(), "no such file"),
        (forge_an_id, r"row 4, column C7: expected 0 to \d+, got 1000000"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not a manifest"),
        (lambda folder: change_manifest(folder, files={}), "found none for terabyte_processed_train.bin, .*vocabulary"),
        (lambda folder: change_manifest(folder, table_sizes=[1] * 25), "manifest.json: table_sizes: .*26 items"),
        (lambda folder: change_manifest(folder, table_size=[1]), "table_size: no such key; did you mean table_sizes"),
        (lambda folder: change_manifest(folder, rows={"train": 801.0, "test": 126, "val": 125}), "rows.train: "),
        (lambda folder: change_manifest(folder, settings={"format": "records"}), "settings.preset: missing"),
        (lambda folder: change_manifest(folder, settings={}), "settings.format: missing"),
        (lambda folder: forge_id_maps(folder, first_id=np.array(10**6)), "id maps are another data set's"),
        (lambda folder: forge_id_maps(folder, C1=np.zeros(3, np.uint32)), "id maps are another data set's"),
        (lambda folder: forge_id_maps(folder, C7=None), "C7: expected distinct values"),
        (lambda folder: (folder / "manifest.json").unlink(), "no such file"),
    ],
)
def test_verify_finds_damage(day_files, tmp_path, damage, words):
    encode_days(day_files, tmp_path, Settings())
    damage(tmp_path)
    with pytest.raises(DataError, match=words):
        verify(tmp_path)


BAD_ROW = b"1" + b"\t1" * 12 + b"\t" + b"\tabcdefgh" * 26 + b"\n"


@pytest.mark.parametrize("existed", [False, True])
def test_a_bad_row_is_named_and_leaves_nothing_behind(day_files, tmp_path, existed):
    bad = tmp_path / "bad_day"
    bad.write_bytes(day_files[0].read_bytes() + BAD_ROW + day_files[1].read_bytes())
    out = tmp_path / "set"
    if existed:
        out.mkdir()
    with pytest.raises(DataError, match=r"bad_day: row 501: column C1: expected up to 8 hex digits.*'abcdefgh'"):
        encode_days([bad, day_files[0]], out, Settings(slab_bytes=1 << 20))
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())


def test_work_before_a_bad_row_is_kept_for_a_run_that_leaves_it_out(day_files, tmp_path, monkeypatch):
    bad = tmp_path / "bad_day"
    bad.write_bytes(day_files[0].read_bytes() + BAD_ROW + day_files[1].read_bytes())
    skip = Settings(slab_bytes=5000, bad_rows="skip")
    encode_days([day_files[0], bad], tmp_path / "whole", skip)
    with pytest.raises(DataError, match=r"row 501: .* is kept in .*the same command goes on .*--bad-rows skip"):
        encode_days([day_files[0], bad], tmp_path / "set", replace(skip, bad_rows="error"))
    parsed = []
    real = cpu.parse
    monkeypatch.setattr(cpu, "parse", lambda text, *rest: parsed.append(len(text)) or real(text, *rest))
    _, report = encode_days([day_files[0], bad], tmp_path / "set", skip)
    assert report.resumed and sum(parsed) < len(day_files[1].read_bytes()) + 10_000
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "inputs", "words"),
    [
        (Settings(), 1, "two days or more"),
        (Settings(days=3), 2, "expected one file to cut"),
        (Settings(days=1), 1, "expected one file to cut"),
        (Settings(slab_bytes=10), 3, "--slab-bytes"),
        (Settings(threads=-1), 3, "--threads"),
        (Settings(device="abacus"), 3, "--device"),
    ],
)
def test_settings_that_cannot_be(day_files, tmp_path, settings, inputs, words):
    with pytest.raises(DataError, match=words):
        encode_days(day_files[:inputs], tmp_path / "set", settings)
    assert not (tmp_path / "set").exists()


def test_a_finished_data_set_is_not_overwritten(day_files, tmp_path):
    encode_days(day_files, tmp_path, Settings())
    before = digests(tmp_path)
    with pytest.raises(DataError, match="finished data set"):
        encode_days(day_files, tmp_path, Settings(seed=1))
    assert digests(tmp_path) == before


ENCODE = """
import re, sys
from pathlib import Path
from gpu_etl.pipeline import Settings, encode_days
encode_days([Path(sys.argv[1]), Path(sys.argv[2])], Path(sys.argv[3]), Settings(slab_bytes=1 << 20, shuffle=False))
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    text = reference.write_rows(seed=1, rows=4000)
    peaks = []
    for copies in (40, 160):
        day = tmp_path / f"day_{copies}"
        day.write_bytes(text * copies)
        (tmp_path / "last").write_bytes(text)
        done = subprocess.run(
            [sys.executable, "-c", ENCODE, day, tmp_path / "last", tmp_path / f"set_{copies}"],
            cwd=ROOT, env=os.environ, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    # 480,000 more rows are 110 MB of text and 81 MB of values.
    assert peaks[1] - peaks[0] < 15e6, peaks
