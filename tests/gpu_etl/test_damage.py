"""What an earlier run left is checked before it is built on; what is damaged is made anew, which is said; and only
what an encode wrote is ever replaced or removed."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError, WorkDamagedError
from gpu_etl.passes import encode as encoding, integrity
from gpu_etl.passes.journal import Journal
from gpu_etl.pipeline import encode_days
from gpu_etl.raw import synthetic
from gpu_etl.rows.numbered import group
from tests.gpu_etl import damage
from tests.gpu_etl.test_resume import BUCKET, SETTINGS, STEP, digests, killed_run

TRAIN = "terabyte_processed_train.bin"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(cpu, "ENCODE_ROWS", STEP)
    monkeypatch.setattr(encoding, "SCATTER_ROWS", STEP)
    monkeypatch.setattr(cpu, "BUCKET_BYTES", BUCKET)


@pytest.fixture(scope="module")
def states(day_files, tmp_path_factory):
    """The whole data set, and the work of runs killed in the count pass, among the buckets, and in the last split."""
    folder = tmp_path_factory.mktemp("states")
    writes = killed_run(0, "", folder / "whole", day_files)
    # By the number of writes: test_the_states_are_what_they_are_called holds them to it.
    points = {"counting": 20, "gathering": writes - 22, "splitting": writes - 8, "publishing": writes - 4}
    for name, point in points.items():
        assert killed_run(point, "", folder / name, day_files) is None
    return folder


@pytest.fixture
def state(states, tmp_path):
    """state(name): a copy of the folder of a killed run."""
    return lambda name: shutil.copytree(states / name, tmp_path / "set")


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


def events(work):
    return [key for line in (work / "journal.jsonl").read_text().splitlines() for key in json.loads(line)]


def drop_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :]))


def test_the_states_are_what_they_are_called(states):
    assert "counted" not in events(states / "counting" / ".work")
    gathering = events(states / "gathering" / ".work")
    assert "gathered" in gathering and "split" not in gathering
    assert events(states / "splitting" / ".work").count("split") == 2
    assert events(states / "publishing" / ".work").count("files") == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("counting", lambda work: flip(work / "bucket_0"), "the rows in the shuffle's buckets differ"),
        ("counting", lambda work: flip(work / "keys"), "keys: the dictionaries' keys differ"),
        ("counting", lambda work: os.truncate(work / "keys", 80), "keys: expected .* bytes to go on behind, found 80"),
        ("counting", lambda work: (work / "bucket_1").unlink(), "rows in shuffle buckets, found"),
        ("counting", lambda work: flip(work / "journal.jsonl"), r"journal.jsonl: line \d+ is damaged or out of"),
        ("counting", lambda work: drop_line(work / "journal.jsonl"), r"journal.jsonl: line \d+ is damaged or out of"),
        ("counting", lambda work: flip(work / "job.json"), "job.json: damaged"),
        ("counting", lambda work: (work / "job.json").unlink(), "job.json: no such file, beside the work"),
        ("counting", lambda work: (work / "journal.jsonl").unlink(), "journal.jsonl: empty or missing"),
        ("gathering", lambda work: flip(work / "bucket_3"), "bucket_3: the coded rows differ"),
        ("gathering", lambda work: (work / "bucket_4").unlink(), "bucket_4: no such file"),
        ("gathering", lambda work: flip(work / "rows_2"), "rows_2: the coded rows differ"),
        ("gathering", lambda work: (work / "rows_2").unlink(), "rows_2: expected .* found 0"),
        ("gathering", lambda work: flip(work / "ids.npz"), "ids.npz: the file differs"),
        ("gathering", lambda work: (work / "ids.npz").unlink(), "ids.npz: no such file"),
        ("gathering", lambda work: flip(work / "vocabulary.npz"), "vocabulary.npz: the file differs"),
        ("gathering", lambda work: flip(work / TRAIN), r"the first \d+ rows of the split 'train'"),
        ("gathering", lambda work: drop_line(work / "journal.jsonl"), "is damaged or out of its place"),
        ("splitting", lambda work: flip(work / TRAIN), "train.bin: the file differs from what"),
        ("splitting", lambda work: (work / TRAIN).unlink(), "train.bin: no such file"),
        ("splitting", lambda work: flip(work / "terabyte_processed_val.bin", 0.1), "rows of the split 'val' differ"),
        ("publishing", lambda work: flip(work / "vocabulary.npz"), "vocabulary.npz: the file differs"),
    ],
)  # fmt: skip
def test_damaged_work_is_made_anew_and_that_is_said(day_files, states, state, capsys, name, change, words):
    out = state(name)
    change(out / ".work")
    encode_days(day_files, out, SETTINGS)
    said = capsys.readouterr().err
    with pytest.raises(AssertionError, match=words):  # pytest.raises for its search in lines
        raise AssertionError(said)
    assert "anew" in said or "goes on from what stands before it" in said
    assert digests(out) == digests(states / "whole")


def test_another_runs_journal_is_not_believed(day_files, states, state, tmp_path, capsys):
    other = tmp_path / "other"
    assert killed_run(20, "", other, [*day_files[1:], day_files[0]]) is None
    out = state("counting")
    shutil.copy(other / ".work" / "journal.jsonl", out / ".work")
    encode_days(day_files, out, SETTINGS)
    assert "journal.jsonl: the journal of another run; the run begins anew" in capsys.readouterr().err
    assert digests(out) == digests(states / "whole")


def test_files_that_change_under_a_run_that_wrote_them_are_an_error(day_files, tmp_path, monkeypatch):
    real = encoding.EncodePass.run

    def run(self, split, *rest):
        real(self, split, *rest)
        if split == "test":
            flip(tmp_path / "set" / ".work" / TRAIN)

    monkeypatch.setattr(encoding.EncodePass, "run", run)
    with pytest.raises(WorkDamagedError, match=r"train.bin: .*written to since this run.*this very run wrote: check"):
        encode_days(day_files, tmp_path / "set", SETTINGS)
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize("case", damage.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("work", [True, False], ids=["work folder", "data set"])
def test_random_damage_ends_right_or_with_an_error(tmp_path, case, work):
    ends = damage.rounds(replace(case, kills=case.kills[1::3]), tmp_path, 3, 7, work)
    assert sum(ends.values()) == 15
    assert not any(end == "wrong" for _, end in ends)
    assert work or all(end == "error" for _, end in ends)


def test_a_sum_of_digests_does_not_depend_on_where_rows_lie():
    coded = np.random.default_rng(1).integers(-(2**31), 2**31, (300, 40)).astype(np.int32)
    numbered, ends = group(coded, 7 << 40, 3, 5, ScratchBuffer())
    sums = np.zeros(5, np.uint64)
    whole = integrity.rows_sum(coded, 7 << 40)
    assert integrity.add_to_buckets(numbered, ends, sums) == integrity.add(*sums.tolist()) == whole
    assert integrity.numbered_sum(numbered[::-1].copy()) == whole
    for column in range(40):
        for bit in (0, 7, 31):
            other = coded.copy()
            other.view(np.uint32)[11, column] ^= np.uint32(1 << bit)
            assert integrity.rows_sum(other, 7 << 40) != whole
    assert integrity.rows_sum(coded[::-1], 7 << 40) != whole


def test_a_journal_that_a_full_disk_takes_in_parts(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:5]))
    journal = Journal(tmp_path / "journal")
    journal.record(slab={"day": 0})
    journal.record(slab={"day": 1})
    journal.close()
    monkeypatch.undo()
    journal = Journal(tmp_path / "journal")
    assert journal.all("slab") == [{"day": 0}, {"day": 1}]
    journal.close()


@pytest.mark.parametrize("name", [TRAIN, "vocabulary.npz", "terabyte_processed_val.bin"])
@pytest.mark.parametrize("when", ["before", "while it was stopped"])
def test_files_of_others_are_not_replaced(day_files, states, state, tmp_path, name, when):
    out = tmp_path / "set" if when == "before" else state("splitting")
    out.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(DataError, match=rf"{name}: there is such a file already, without a manifest.json"):
        encode_days(day_files, out, SETTINGS)
    assert (out / name).read_text() == "mine"
    (out / name).unlink()
    _, report = encode_days(day_files, out, SETTINGS)
    assert report.resumed == (when != "before") and digests(out) == digests(states / "whole")


def test_notes_in_a_work_folder_stay(day_files, states, state, capsys):
    out = state("counting")
    kept = [out / ".work" / "notes.txt", out / ".work" / "part_0" / "mine", out / ".work" / "rows_2.txt"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    encode_days(day_files, out, SETTINGS)
    assert "not made by this tool, and left there: notes.txt, part_0, rows_2.txt" in capsys.readouterr().err
    assert all(path.read_text() == "mine" for path in kept)
    assert sorted(path for path in (out / ".work").rglob("*") if path.is_file()) == sorted(kept)


def test_a_work_folder_of_unknown_origin_is_not_touched(day_files, tmp_path):
    work = tmp_path / "set" / ".work"
    work.mkdir(parents=True)
    (work / "keys").write_text("of my house")
    for _ in range(2):
        with pytest.raises(DataError, match=r"\.work: holds keys, but nothing that says that this tool wrote them"):
            encode_days(day_files, tmp_path / "set", SETTINGS)
    assert (work / "keys").read_text() == "of my house"


def test_synth_replaces_no_real_day(day_files, tmp_path):
    shutil.copy(day_files[0], tmp_path / "day_1")
    arguments = {"rows": 100, "days": 2, "seed": 0, "signal": 1.0}
    with pytest.raises(DataError, match=r"holds day_1, but no truth.json that says that they are synthetic"):
        synthetic.write_days(tmp_path, compress=False, **arguments)
    assert (tmp_path / "day_1").read_bytes() == day_files[0].read_bytes()
    synthetic.write_days(tmp_path, compress=True, **arguments)
    synthetic.write_days(tmp_path, compress=True, **arguments)
