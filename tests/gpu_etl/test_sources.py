"""Day files that change, while they are read or between two commands: the set of one state of them, or an error."""

import gzip
import os
import shutil

import pytest

from gpu_etl import pipeline
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.errors import DataError
from gpu_etl.passes import encode as encoding
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw import reader as extract, stamps as sources, text
from tests import reference
from tests.gpu_etl.test_resume import BUCKET, SETTINGS, STEP, digests, killed_run

ONE_READER = Settings(slab_bytes=20_000, threads=1)


@pytest.fixture
def days(day_files, tmp_path):
    """Day files that may be changed."""
    return [shutil.copy2(path, tmp_path / path.name) for path in day_files]


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(cpu, "ENCODE_ROWS", STEP)
    monkeypatch.setattr(encoding, "SCATTER_ROWS", STEP)
    monkeypatch.setattr(cpu, "BUCKET_BYTES", BUCKET)


def flip_labels(path):
    """Other bytes, as many."""
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([bytes([line[0] ^ 1]) + line[1:] if line else line for line in lines]))


def cut_at_a_row_end(path):
    found = path.read_bytes()
    os.truncate(path, found.index(b"\n", len(found) // 3) + 1)


def grow(path):
    with open(path, "ab") as file:
        file.write(reference.write_rows(seed=8, rows=3))


def rewrite(path):
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_at_a_row_end, r"day_2: expected 59446 bytes, as when it was opened, found an end behind \d+: it"),
        (grow, r"day_2: the day file was written to since this run began \(59,446 bytes, \d\d,\d\d\d now\)"),
        (flip_labels, r"day_2: the day file was written to since this run began \(same size\)"),
        (os.unlink, r"No such file or directory; mend that, then .*day_2"),
    ],
)
def test_a_day_that_changes_while_others_are_read(days, tmp_path, monkeypatch, change, words):
    real, calls = cpu.find_rows, []

    def find_rows(text):
        calls.append(len(text))
        if len(calls) == 1:
            change(days[2])
        return real(text)

    monkeypatch.setattr(cpu, "find_rows", find_rows)
    with pytest.raises((DataError, OSError), match=words):
        encode_days(days, tmp_path / "set", ONE_READER)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_day_that_is_cut_while_it_is_read(days, tmp_path, monkeypatch):
    days[1].write_bytes(days[1].read_bytes() * 40)  # more than one buffer of the reader
    real, calls = text._PlainText._read, []

    def read(self, buffer, begin):
        if begin > 1 << 20 and not calls:
            calls.append(begin)
            os.truncate(days[1], days[1].read_bytes().index(b"\n", 2 << 20) + 1)
        return real(self, buffer, begin)

    monkeypatch.setattr(text._PlainText, "_read", read)
    with pytest.raises(DataError, match=r"day_1: expected 2835560 bytes, as when it was opened, found an end behind 2"):
        encode_days(days, tmp_path / "set", ONE_READER)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("change", [rewrite, flip_labels])
def test_a_day_that_changes_behind_its_last_row(days, tmp_path, monkeypatch, capsys, change):
    real = encoding.EncodePass.run

    def run(self, split, *rest):
        real(self, split, *rest)
        if split == "train":
            change(days[0])

    monkeypatch.setattr(encoding.EncodePass, "run", run)
    with pytest.raises(DataError, match=r"day_0: the day file was written to since this run began"):
        encode_days(days, tmp_path / "set", ONE_READER)
    assert not (tmp_path / "set" / "manifest.json").exists()
    monkeypatch.setattr(encoding.EncodePass, "run", real)
    encode_days(days, tmp_path / "set", ONE_READER)
    said = capsys.readouterr().err
    assert "comparing the checksums of 1 day files" in said
    assert ("day_0: not proven to be the bytes" in said) == (change is flip_labels)
    encode_days(days, tmp_path / "new", ONE_READER)
    assert digests(tmp_path / "set") == digests(tmp_path / "new")


@pytest.mark.parametrize("point", [12, 45])  # in the count pass, and while days that were read are written
@pytest.mark.parametrize("change", [rewrite, flip_labels])
def test_a_day_that_changes_between_kill_and_restart(days, tmp_path, small_steps, capsys, point, change):
    out = tmp_path / "set"
    assert killed_run(point, "", out, days) is None
    change(days[0])
    _, report = encode_days(days, out, SETTINGS)
    assert report.resumed == (change is rewrite and point == 45)  # only then is there a whole checksum to compare
    assert report.resumed or "begins anew" in capsys.readouterr().err
    encode_days(days, tmp_path / "new", SETTINGS)
    assert digests(out) == digests(tmp_path / "new")


def test_copies_of_the_days_elsewhere_are_the_days(days, tmp_path, small_steps, capsys):
    out, copies = tmp_path / "set", tmp_path / "copies"
    writes = killed_run(0, "", tmp_path / "whole", days)
    assert killed_run(writes - 12, "", out, days) is None
    copies.mkdir()
    moved = [shutil.copy(path, copies) for path in days]
    _, report = encode_days(moved, out, SETTINGS)
    assert report.resumed and "comparing the checksums of 3 day files" in capsys.readouterr().err


def test_finished_already_is_told_by_the_bytes(days, tmp_path, capsys):
    out, other = tmp_path / "set", tmp_path / "other"
    encode_days(days, out, SETTINGS)
    before, times = digests(out), os.stat(days[1])
    other.mkdir()
    copies = [shutil.copy(path, other) for path in days]
    encode_days(copies, out, SETTINGS)
    said = capsys.readouterr().err
    assert "comparing the checksums of 3 day files" in said and "finished already" in said
    flip_labels(days[1])
    os.utime(days[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"made of other bytes than those of .*day_1; choose another --out"):
        encode_days(days, out, SETTINGS)
    flip_labels(other / "day_2")
    with pytest.raises(DataError, match=r"made of other bytes than those of .*other/day_2; choose"):
        encode_days(copies, out, SETTINGS)
    assert digests(out) == before


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 160)])
def test_a_data_set_that_lacks_a_file_is_not_finished(days, tmp_path, change):
    encode_days(days, tmp_path / "set", SETTINGS)
    change(tmp_path / "set" / "terabyte_processed_val.bin")
    with pytest.raises(DataError, match=r"expected \d+ bytes by the manifest, found .*; the data set is damaged"):
        encode_days(days, tmp_path / "set", SETTINGS)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_packed_day_is_read_to_its_end(days, tmp_path, kind):
    """What was read of a file is held against its size, whatever unpacks it."""
    packed = gzip.compress if kind == "gzip" else pytest.importorskip("zstandard").compress
    path = tmp_path / "packed"
    path.write_bytes(packed(days[0].read_bytes()))
    (source,) = extract.open_sources([path])
    assert sum(1 for _ in extract.read_day(source, 0, 20_000)) > 1
    source.read = 0
    source.size += 1
    with pytest.raises(DataError, match=r"packed: expected [\d,]+ bytes as when this run began, read [\d,]+: the"):
        list(extract.read_day(source, 0, 20_000))
    with pytest.raises(DataError, match=r"packed: .*is gone since this run began"):
        path.unlink()
        sources.check_unchanged(source)


def test_a_fault_that_is_none_of_the_disk_is_not_called_one(days, tmp_path, monkeypatch):
    def late(*_):
        raise TimeoutError("no answer within 30 s")

    monkeypatch.setattr(pipeline.vocabulary, "build", late)
    with pytest.raises(DataError, match=r"^TimeoutError: no answer within 30 s \(not a fault of the disk\); the work"):
        encode_days(days, tmp_path / "set", SETTINGS)
    monkeypatch.undo()
    _, report = encode_days(days, tmp_path / "set", SETTINGS)
    assert report.resumed
