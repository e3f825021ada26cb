"""Days of part files, as Spark writes them: the same bytes as those of the joined day, however they are read."""

import gzip
import os
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.commands.verify import verify
from gpu_etl.common.errors import DataError
from gpu_etl.load.raw import RawDay
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw.paths import expand, list_days
from gpu_etl.raw.reader import open_sources
from gpu_etl.schema import COLUMN_NAMES, choose_preset
from tests import reference
from tests.gpu_etl.test_resume import digests, killed_run

zstandard = pytest.importorskip("zstandard")
ROWS = (400, 0, 37, 613, 1)
CPU = torch.device("cpu")
SETTINGS = Settings(slab_bytes=20_000, seed=5, threads=1)


def as_parquet(text, path):
    fields = [line.split(b"\t") for line in text.splitlines()]
    columns = list(zip(*fields, strict=True)) if fields else [()] * 40
    arrays = [
        pa.array([int(field) if field else None for field in column], pa.int32()) if place < 14
        else pa.array([field.decode() or None for field in column], pa.string())
        for place, column in enumerate(columns)
    ]  # fmt: skip
    pq.write_table(pa.table(arrays, list(COLUMN_NAMES)), path, row_group_size=50)


KINDS = {
    "text": ("", lambda text, path: path.write_bytes(text)),
    "gzip": (".gz", lambda text, path: path.write_bytes(gzip.compress(text))),
    "zstd": (".zst", lambda text, path: path.write_bytes(zstandard.compress(text))),
    "parquet": ("-4b1c.snappy.parquet", as_parquet),
}


def day_texts(day):
    return [reference.write_rows(seed=10 * day + part, rows=rows) if rows else b"" for part, rows in enumerate(ROWS)]


def write_parts(folder, texts, kinds, newline_at_end=True):
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for number, text in enumerate(texts):
        ending, write = KINDS[kinds[number % len(kinds)]]
        write(text if newline_at_end else text.removesuffix(b"\n"), folder / f"part-{number:05}{ending}")
    return folder


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """Three days as a file each, and what they encode to."""
    folder = tmp_path_factory.mktemp("joined")
    days = [folder / f"day_{day}" for day in range(3)]
    for day, path in enumerate(days):
        path.write_bytes(b"".join(day_texts(day)))
    encode_days(days, folder / "set", SETTINGS)
    return days, digests(folder / "set")


def parted(folder, *kinds, newline_at_end=True):
    """The same days as part files."""
    folder.mkdir()
    return [write_parts(folder / f"day_{day}", day_texts(day), kinds, newline_at_end) for day in range(3)]


def without_manifest(found):
    return {name: digest for name, digest in found.items() if name != "manifest.json"}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kinds", [("text",), ("gzip",), ("zstd",), ("parquet",), ("parquet", "gzip", "text", "zstd")])
def test_part_files_give_the_bytes_of_the_joined_day(joined, tmp_path, monkeypatch, kinds, threads):
    monkeypatch.setattr(cpu, "CORES_PER_READER", 1 / threads)
    days = parted(tmp_path / "days", *kinds)
    made, _ = encode_days(expand([tmp_path / "days"]), tmp_path / "set", SETTINGS)
    found = digests(tmp_path / "set")
    if kinds == ("text",):
        assert found == joined[1]  # names, sizes and checksums of the days are those of the joined ones, too
    assert without_manifest(found) == without_manifest(joined[1])
    for day, source in zip(days, made.sources, strict=True):
        text = b"".join(path.read_bytes() for path in sorted(day.glob("part-*")))
        assert (source["file"], source["bytes"]) == (day.name, len(text))
        assert int(source["crc32"], 16) == zlib.crc32(text)
    verify(tmp_path / "set")
    again, _ = encode_days(expand([tmp_path / "days"]), tmp_path / "set", SETTINGS)  # finished already
    assert again == made


def test_the_last_row_of_a_part_needs_no_newline(joined, tmp_path):
    parted(tmp_path / "days", "text", "gzip", newline_at_end=False)
    encode_days(expand([tmp_path / "days"]), tmp_path / "set", SETTINGS)
    assert without_manifest(digests(tmp_path / "set")) == without_manifest(joined[1])


def test_sampling_counts_the_rows_of_the_day(joined, tmp_path):
    settings = replace(SETTINGS, preset=choose_preset("deepspark"))
    encode_days(joined[0], tmp_path / "joined", settings)
    parted(tmp_path / "days", "text")
    encode_days(expand([tmp_path / "days"]), tmp_path / "set", settings)
    assert digests(tmp_path / "set") == digests(tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "gzip", "parquet"])
def test_a_killed_run_goes_on_inside_a_part(joined, tmp_path, kind):
    days = parted(tmp_path / "days", kind)
    writes = killed_run(0, "", tmp_path / "whole", days)
    for kill in range(3):
        out = tmp_path / f"killed_{kill}"
        assert killed_run(1 + writes * (1 + kill) // 5, "torn" if kill % 2 else "", out, days) is None
        encode_days(days, out, replace(SETTINGS, slab_bytes=3000))
        assert digests(out) == digests(tmp_path / "whole")
    assert without_manifest(digests(tmp_path / "whole")) == without_manifest(joined[1])


def test_a_part_of_another_size_is_another_job(tmp_path):
    days = parted(tmp_path / "days", "text")
    writes = killed_run(0, "", tmp_path / "whole", days)
    assert killed_run(writes // 3, "", tmp_path / "set", days) is None
    rows = (days[0] / "part-00003").read_bytes().splitlines(keepends=True)
    (days[0] / "part-00003").write_bytes(b"".join(rows[:-1]))
    (days[0] / "part-00004").write_bytes(rows[-1] + (days[0] / "part-00004").read_bytes())  # the same bytes in all
    with pytest.raises(DataError, match="unfinished run with other sources"):
        encode_days(days, tmp_path / "set", SETTINGS)


def test_a_part_written_again_in_place_is_noticed(tmp_path, capsys):
    days = parted(tmp_path / "days", "text")
    writes = killed_run(0, "", tmp_path / "whole", days)
    assert killed_run(writes // 2, "", tmp_path / "set", days) is None
    part = days[0] / "part-00000"
    rows = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(rows[::-1]))  # of the same size
    os.utime(part, ns=(1, 1))
    with pytest.raises(DataError, match=r"made of other bytes than those of .*day_0"):
        encode_days(days, tmp_path / "whole", SETTINGS)
    encode_days(days, tmp_path / "set", SETTINGS)
    assert "day_0: not proven to be the bytes" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "whole")
    encode_days(days, tmp_path / "whole", SETTINGS)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def test_a_bad_row_is_told_by_part_and_its_row_there(tmp_path):
    days = parted(tmp_path / "days", "text")
    part = days[1] / "part-00003"
    rows = part.read_bytes().splitlines(keepends=True)
    rows[99] = rows[99].replace(b"\t", b"\tx", 1)
    part.write_bytes(b"".join(rows))
    with pytest.raises(DataError, match=r"day_1/part-00003: row 100: column I1: "):
        encode_days(days, tmp_path / "set", replace(SETTINGS, slab_bytes=5000))


def test_raw_days_are_scored_from_part_files(joined, tmp_path):
    days = parted(tmp_path / "days", "gzip", "text")
    encode_days(days, tmp_path / "set", SETTINGS)
    found = [np.concatenate([batch[i] for batch in RawDay(tmp_path / "set", days[2]).batches(CPU)]) for i in range(3)]
    wanted = [
        np.concatenate([batch[i] for batch in RawDay(tmp_path / "set", joined[0][2]).batches(CPU)]) for i in range(3)
    ]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kinds", [("text",), ("parquet", "text"), ("gzip",)])
def test_a_cluster_gives_the_same_bytes(joined, tmp_path, monkeypatch, kinds):
    pytest.importorskip("dask.distributed")
    from gpu_etl.cluster import byte_ranges as parts

    monkeypatch.setattr(parts, "MIN_BYTES", 20_000)  # cuts the larger parts of text
    parted(tmp_path / "days", *kinds)
    settings = replace(SETTINGS, workers=2)
    cut = parts.cut(open_sources(expand([tmp_path / "days"])), settings, 2)
    assert len(cut) == 3 if kinds == ("gzip",) else len(cut) > 9
    encode_days(expand([tmp_path / "days"]), tmp_path / "set", settings)
    assert without_manifest(digests(tmp_path / "set")) == without_manifest(joined[1])


def test_names(tmp_path, capsys):
    folder = tmp_path / "days"
    days = parted(folder, "text")
    (days[1] / "part-00002").rename(days[1] / "part-00009")
    (days[1] / "_SUCCESS").unlink()
    (days[2] / "notes.txt").touch()
    (days[2] / ".part-00000.crc").touch()
    assert expand([folder]) == expand([folder / "day_*"]) == expand(days) == days
    assert list_days(days[:1]) == f"one day of part files: {days[0]}"
    sources = open_sources(days)
    assert [file.path.name for file in sources[1].files] == ["part-00000", "part-00003", "part-00004", "part-00009"]
    said = capsys.readouterr().err
    assert f"{days[1]}: no _SUCCESS" in said and f"{days[1]}: 5 of the part numbers 0 to 9 are not there" in said
    assert f"{days[2]}: left out, as they are no part files: notes.txt" in said and ".crc" not in said
    assert expand([folder / "day_0" / "part-*"]) == sorted((folder / "day_0").glob("part-*"))  # a day each


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda day: (day / "_temporary").mkdir(), "_temporary: a job writes part files there and has not ended"),
    (lambda day: (day / "part-00000.gz").write_bytes(b"x"), "found both part-00000 and part-00000.gz"),
    (lambda day: (day / "part-7").symlink_to(day / "part-00000"), "part-7: the same day file is named twice"),
    (lambda day: (day / "part-7").symlink_to(day / "gone"), "part-7: expected .* found a link that leads nowhere"),
])  # fmt: skip
def test_folders_of_part_files_that_are_refused(tmp_path, spoil, words):
    (day, *_) = parted(tmp_path / "days", "text")
    spoil(day)
    with pytest.raises(DataError, match=words):
        open_sources([day])


def test_part_files_without_a_byte_are_no_day(tmp_path):
    write_parts(tmp_path / "day_0", [b"", b""], ["text"])
    with pytest.raises(DataError, match="day_0: the file is empty"):
        open_sources([tmp_path / "day_0"])


def test_a_day_as_a_file_and_as_part_files(tmp_path):
    parted(tmp_path / "days", "text")
    (tmp_path / "days" / "day_1.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"expected each day once, found both day_1 and day_1\.gz"):
        expand([tmp_path / "days"])
