"""Manifests and id maps from outside: whatever is in them, a command ends right or with words, and takes little."""

import io
import json
import os
import random
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest

from gpu_etl.__main__ import main
from gpu_etl.common.errors import DataError
from gpu_etl.dataset.manifest import Manifest, describe_file
from gpu_etl.passes import integrity
from gpu_etl.passes.settings import Settings
from gpu_etl.pipeline import encode_days
from gpu_etl.rows.vocabulary import Vocabulary
from tests.gpu_etl import tamper

VOCABULARY = "vocabulary.npz"


@pytest.fixture(scope="module")
def data_set(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "set"
    encode_days(day_files, out, Settings())
    return out


@pytest.fixture
def folder(data_set, tmp_path):
    return shutil.copytree(data_set, tmp_path / "set")


def end(words, capsys):
    """Status of a command and what it said; the test fails where it raises anything."""
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    assert status in (0, 1), said.err
    assert status == 0 or (said.err.count("error: ") == 1 and not said.out), said.err
    return status, said.err


def test_every_tampered_manifest_is_read_or_refused_by_name(folder):
    path = folder / "manifest.json"
    good, refused = path.read_bytes(), 0
    for name, data in tamper.variants(good):
        path.write_bytes(data)
        try:
            found = Manifest.read(folder)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 5000, name
            refused += 1
        else:
            assert sum(found.rows.values()) == 1052 and max(found.table_sizes) <= 1053, name
    assert refused > 900


def test_no_tampered_manifest_brings_a_command_down(folder, day_files, capsys):
    path = folder / "manifest.json"
    good = path.read_bytes()
    found = list(tamper.variants(good))
    ends = {0: 0, 1: 0}
    for _, data in random.Random(5).sample(found, 60) + found[:18]:
        path.write_bytes(data)
        for words in (["verify", folder], ["inspect", folder], ["encode", *day_files, "--out", folder]):
            ends[end(words, capsys)[0]] += 1
    assert ends[1] > 150
    path.write_bytes(good)
    assert end(["verify", folder], capsys)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": {"train": 801, "test": 126}}, "rows: expected train, test, val, got no val"),
        ({"rows": {"train": 801, "test": 126, "val": 10**18}}, "but 1052 were kept of all sources"),
        ({"table_sizes": [2**31 - 1] * 26}, "table_sizes: expected at most 1053, as 1052 rows show no more values"),
        ({"sources": []}, "sources: "),
        ({"files": {}}, "found none for terabyte_processed_train.bin"),
        ({"version": 3}, "expected version 2, got 3"),
    ],
)
def test_a_manifest_must_agree_with_itself(folder, change, words):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=words):
        Manifest.read(folder)


def test_files_outside_the_data_set_are_not_listed(folder):
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    whole["files"]["../../etc/passwd"] = whole["files"][VOCABULARY]
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match=r"files: '../../etc/passwd' is no file of a data set of the form 'records'"):
        Manifest.read(folder)


def npy(array, shape=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    if shape is None:
        return buffer.getvalue()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": array.dtype.str, "fortran_order": False, "shape": shape})
    return head.getvalue() + array.tobytes()


def write_zip(path, entries, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)


def entries_of(path):
    with np.load(path) as arrays:
        return {name: npy(arrays[name]) for name in arrays.files}


# What replaces the array C5 (uint32 keys), or all of the file.
ARRAYS = {
    "wrong dtype": lambda keys: npy(keys.astype(np.int64)),
    "floats": lambda keys: npy(keys.astype(np.float32)),
    "big endian": lambda keys: npy(keys.astype(">u4")),
    "two dimensions": lambda keys: npy(keys[None]),
    "no dimension": lambda keys: npy(keys[0]),
    "pickled": lambda keys: npy(np.array([{"a": 1}], object)),
    "a row less": lambda keys: npy(keys[:-1]),
    "a value twice": lambda keys: npy(np.full_like(keys, 7)),
    "a header of 4 GB": lambda keys: npy(keys, (10**9,)),
    "a header of 10^30": lambda keys: npy(keys, (10**30,)),
    "a negative header": lambda keys: npy(keys, (-1,)),
    "nothing": lambda keys: b"",
    "no numpy": lambda keys: b"\x00" * 200,
    "cut in the header": lambda keys: npy(keys)[:30],
    "cut in the values": lambda keys: npy(keys)[:-3],
    "version 9": lambda keys: npy(keys)[:6] + b"\x09\x09" + npy(keys)[8:],
    "a header of parentheses": lambda keys: b"\x93NUMPY\x01\x00\xf0\x0f" + b"(" * 4080,
    "a header of code": lambda keys: b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch pwned')".ljust(64),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_id_maps_of_another_kind_are_refused_by_name(folder, kind, capsys):
    path = folder / VOCABULARY
    with np.load(path) as arrays:
        keys = arrays["C5"]
    write_zip(path, entries_of(path) | {"C5": ARRAYS[kind](keys)})
    _tell(folder)
    status, said = end(["verify", folder], capsys)
    assert status == 1 and f"{path}: " in said and ("C5" in said or "id maps are another data set's" in said), said


def _tell(folder):
    """The manifest tells of the id maps as they are now: the attacker wrote both."""
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    whole["files"][VOCABULARY] = describe_file(folder / VOCABULARY)
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(b""), "not a .npz file, or a damaged one"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 99), "not a .npz file, or a damaged one"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "not a .npz file, or a damaged one"),
        (lambda path: write_zip(path, {"C1": npy(np.zeros(3, np.uint32))}), "first_id.npy: no such array"),
        (lambda path: write_zip(path, entries_of(path), zipfile.ZIP_DEFLATED), "is compressed, "),
        (lambda path: write_zip(path, entries_of(path), zipfile.ZIP_LZMA), "is compressed, "),
        (lambda path: write_zip(path, entries_of(path) | {"C1_counts": npy(-np.ones(18, np.int64))}), "C1_counts: exp"),
        (lambda path: write_zip(path, entries_of(path) | {"C1_counts": npy(np.ones(5, np.int64))}), "C1_counts: exp"),
        (lambda path: write_zip(path, entries_of(path) | {"first_id": npy(np.array("x"))}), "first_id.npy: expec"),
        (lambda path: write_zip(path, {"more": npy(np.zeros(99_999, np.int64))}), r"bytes, where id maps of \d+ ids"),
    ],
)  # fmt: skip
def test_id_maps_that_are_another_file_are_refused(folder, change, words, capsys):
    change(folder / VOCABULARY)
    _tell(folder)
    status, said = end(["verify", folder], capsys)
    assert status == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def test_id_maps_that_open_to_a_thousand_times_their_size_are_not_opened(folder):
    """A file whose arrays are a thousand times as large; what is allocated stays below the file's own size."""
    path = folder / VOCABULARY
    zeros = io.BytesIO()
    np.lib.format.write_array_header_1_0(zeros, {"descr": "<u4", "fortran_order": False, "shape": (2**26,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("C1.npy", "w", force_zip64=True) as entry:
        entry.write(zeros.getvalue())
        for _ in range(16):
            entry.write(bytes(2**24))
    assert path.stat().st_size < 2**28 / 500
    for sizes in (None, Manifest.read(folder).table_sizes):
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r"vocabulary\.npz: "):
                Vocabulary.load(folder, sizes)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_entries_of_a_zip_file_that_share_bytes_are_refused(folder):
    path = folder / VOCABULARY
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("first_id.npy", npy(np.array(1)))
        file.writestr("C1.npy", npy(np.zeros(9_999, np.uint32)))
        for number in range(2, 27):  # each names the bytes of the first
            entry = zipfile.ZipInfo(f"C{number}.npy")
            one = file.getinfo("C1.npy")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(entry, field, getattr(one, field))
            file.filelist.append(entry)
    with pytest.raises(DataError, match=r"tells of [\d,]+ bytes of arrays in a file of"):
        Vocabulary.load(folder)


JOBS = {
    "a list": [], "a number": 5, "null": None, "no key": {}, "buckets of 10^12": {"buckets": 10**12},
    "buckets below 0": {"buckets": -1}, "buckets are text": {"buckets": "x"}, "files of text": {"files": "x"},
    "files of numbers": {"files": [1]}, "files without stamps": {"files": [[["x"]]]}, "sources null": {"sources": None},
    "another key": {"zzz": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", JOBS)
def test_a_forged_job_is_work_that_is_damaged(day_files, data_set, tmp_path, kind, capsys):
    """job.json with a right checksum, of a run that was stopped: the run begins anew, and that is said."""
    out = tmp_path / "set"
    work = out / ".work"
    days = [tmp_path / path.name for path in day_files]
    for day, path in zip(days, day_files, strict=True):
        shutil.copy(path, day)
    days[2].write_bytes(days[2].read_bytes() + b"bad row\n")
    words = ["encode", *map(str, days), "--out", str(out)]
    assert main([*words, "--slab-bytes", "4096"]) == 1 and work.exists()
    found = integrity.read_json(work / "job.json")
    made = JOBS[kind]
    integrity.write_json(work / "job.json", found | made if isinstance(made, dict) and made else made)
    capsys.readouterr()
    status, said = end([*words, "--bad-rows", "skip"], capsys)
    assert status == 0 and "job.json: " in said and "begins anew" in said, said


def test_a_day_whose_name_is_no_text_is_refused_before_the_work(day_files, tmp_path):
    odd = tmp_path / os.fsdecode(b"day_0\xff")
    shutil.copy(day_files[0], odd)
    with pytest.raises(DataError, match="the name is not UTF-8"):
        encode_days([odd, *day_files[1:]], tmp_path / "set", Settings())
    assert not (tmp_path / "set").exists()
