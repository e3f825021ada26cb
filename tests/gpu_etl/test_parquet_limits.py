"""Parquet files that ask for far more memory than they have bytes end in words; honest ones of every form are read."""

import io
import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_etl.common.errors import DataError
from gpu_etl.raw import parquet_limits
from gpu_etl.raw.parquet_pages import DATA_PAGE, DELTA_BYTE_ARRAY, DICTIONARY_PAGE, Chunk, PageError
from gpu_etl.schema import COLUMN_NAMES
from tests.conftest import ROOT
from tests.gpu_etl.test_inputs import LINES, ROWS, parsed, table_of

MIB = 1 << 20
OTHERS = [name for name in COLUMN_NAMES if name != "C5"]


def write(path, c5, rows, **options):
    """A day of `rows` rows whose C5 is the given array."""
    columns = {name: pa.array(np.zeros(rows, np.int8)) for name in OTHERS} | {"C5": c5}
    pq.write_table(pa.table([columns[name] for name in COLUMN_NAMES], COLUMN_NAMES), path, **options)
    return path


def one_of(value, rows):
    """An array of one value, as a dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


def delta(**options):
    return {"use_dictionary": False, "column_encoding": {"C5": "DELTA_BYTE_ARRAY"}, **options}


def bombs():
    """name -> (C5, rows, how it is written): each takes far more than 64 MiB to decode."""
    long = "0" * MIB
    return {
        "dictionary": (one_of("0" * 20_000_000, 70), 70, {}),
        "value by row": (one_of(long, 200), 200, {}),
        "plain page": (pa.array([long] * 40), 40, {"use_dictionary": False, "data_page_size": 1 << 30}),
        "plain pages": (
            pa.array([long] * 80), 80, {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 1}
        ),
        "one value": (pa.array(["0" * 40 * MIB] + ["1"] * 9), 10, {"use_dictionary": False}),
        "shared beginnings": (pa.array([long] * 80), 80, delta(data_page_version="2.0", data_page_size=1 << 30)),
        "snappy": (one_of(long, 200), 200, {"compression": "snappy"}),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", bombs())
def test_what_takes_gigabytes_is_refused_with_its_column(tmp_path, monkeypatch, name):
    monkeypatch.setattr(parquet_limits, "MOST_BYTES", 64 * MIB)
    c5, rows, options = bombs()[name]
    path = write(tmp_path / "day", c5, rows, **{"compression": "zstd", **options})
    before = pa.total_allocated_bytes()
    words = r"day: row group 0, column 'C5': .* bytes for its pages.* to decode; expected at most [\d,]+ .*it anew"
    with pytest.raises(DataError, match=words):
        parsed(path)
    assert pa.total_allocated_bytes() - before < 8 * MIB
    monkeypatch.setattr(parquet_limits, "MOST_BYTES", 8 << 30)
    monkeypatch.setattr(parquet_limits, "memory_left", lambda: 16 << 30)
    assert len(parsed(path)[1]) == rows  # they are bad rows where memory is at hand


def limited(*words):
    """A command under a limit of 2 GiB."""
    return subprocess.run(
        [sys.executable, "-m", "gpu_etl", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )  # fmt: skip


@pytest.mark.slow
def test_under_a_limit_of_two_gigabytes_a_bomb_ends_in_words_and_a_day_is_encoded(tmp_path):
    bomb = write(tmp_path / "bomb", one_of("0" * 20_000_000, 100_000), 100_000, compression="zstd")
    assert bomb.stat().st_size < 40_000
    done = limited("encode", bomb, "--days", 2, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "bomb: row group 0, column 'C5': 40,0" in done.stderr and "to decode; expected at most" in done.stderr
    assert not (tmp_path / "out").exists()
    longer = write(tmp_path / "longer", one_of("0" * 2000, 100_000), 100_000, compression="zstd")
    done = limited(
        "encode", longer, "--days", 2, "--out", tmp_path / "out", "--device", "cpu", "--bad-rows", "skip",
        "--max-bad-rows", 10**6,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "got days of [0, 0] rows" in done.stderr
    pq.write_table(pa.table(table_of(LINES * 30), COLUMN_NAMES), tmp_path / "day")
    done = limited("encode", tmp_path / "day", "--days", 2, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout.splitlines()[-1])["rows"].values()) == 30 * len(LINES)


def test_rows_without_end_are_refused(tmp_path, monkeypatch):
    n = 3_000_000
    columns = [pa.array(np.zeros(n, np.int8))] + [pa.nulls(n, pa.int32())] * 39
    pq.write_table(pa.table(columns, COLUMN_NAMES), tmp_path / "day", row_group_size=n, write_statistics=False)
    size = (tmp_path / "day").stat().st_size
    assert size * 10 < n
    (tmp_path / "day").rename(tmp_path / "few")
    columns = [column.slice(0, 1000) for column in columns]
    pq.write_table(pa.table(columns, COLUMN_NAMES), tmp_path / "day")
    assert len(parsed(tmp_path / "day")[0]) == 1000
    monkeypatch.setattr(parquet_limits, "MOST_ROWS_A_BYTE", n // size - 1)
    with pytest.raises(DataError, match=r"few: .* found 3,000,000 rows in [\d,]+ bytes"):
        parsed(tmp_path / "few")


FORMS = [
    {}, {"compression": "none"}, {"compression": "gzip"}, {"compression": "brotli"}, {"compression": "lz4"},
    {"compression": "zstd", "data_page_version": "2.0"}, {"use_dictionary": False, "data_page_size": 500},
    {"data_page_version": "2.0", "compression": "none", "data_page_size": 300}, {"dictionary_pagesize_limit": 200},
    {"use_dictionary": False, "column_encoding": {n: "DELTA_BYTE_ARRAY" for n in COLUMN_NAMES[14:]}},
    {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd",
     "column_encoding": {n: "DELTA_BYTE_ARRAY" for n in COLUMN_NAMES[14:]}},
    {"use_dictionary": False, "column_encoding": {n: "DELTA_LENGTH_BYTE_ARRAY" for n in COLUMN_NAMES[14:]}},
    {"use_dictionary": False, "column_encoding": {n: "DELTA_BINARY_PACKED" for n in COLUMN_NAMES[1:14]}},
    {"write_page_checksum": True, "write_page_index": True, "row_group_size": 70},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_are_read_and_their_pages_found(tmp_path, form):
    table, path = pa.table(table_of(LINES), COLUMN_NAMES), tmp_path / "day"
    pq.write_table(table, path, **form)
    assert parsed(path)[0] == ROWS
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        for place, name in enumerate(COLUMN_NAMES):
            meta = file.metadata.row_group(group).column(place)
            with open(path, "rb") as stored:
                chunk = Chunk(stored, meta, True)
                pages = list(chunk.pages())
                assert sum(page.values for page in pages if page.kind != DICTIONARY_PAGE) == meta.num_values
                first = min(meta.dictionary_page_offset or meta.data_page_offset, meta.data_page_offset)
                assert pages[-1].place + pages[-1].stored == first + meta.total_compressed_size
                told = [chunk.longest(p) for p in pages if p.kind == DICTIONARY_PAGE or p.encoding == DELTA_BYTE_ARRAY]
                if place >= 14 and told:
                    shared = "DELTA_BYTE_ARRAY" in form.get("column_encoding", {}).values()
                    assert 8 <= max(told) <= (16 if shared else 8), (name, told)
    assert parquet_limits.rows_at_a_time(file, path, 0, COLUMN_NAMES, 1 << 16) == 1 << 16


def test_lengths_of_strings_that_share_beginnings(tmp_path):
    random = np.random.default_rng(0)
    for version in ("1.0", "2.0"):
        for sizes in (random.integers(0, 40, 3000), [0] * 500, [1, 300, 2], random.integers(0, 9, 129)):
            strings = ["ab"[int(random.integers(2))] * int(size) for size in sizes]
            strings[::7] = [None] * len(strings[::7])
            form = delta(data_page_version=version)
            path = write(tmp_path / "day", pa.array(strings, pa.string()), len(strings), **form)
            meta, most = pq.read_metadata(path).row_group(0).column(18), max(len(s or "") for s in strings)
            with open(path, "rb") as stored:
                chunk = Chunk(stored, meta, True)
                assert most <= max(map(chunk.longest, chunk.pages())) <= 2 * most


def header(**fields):
    """A page's header; sizes as zigzag numbers of any length."""
    out, last = b"", 0
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, bytes):
            out += bytes([(number - last) << 4 | 12]) + value
        else:
            value, out = value * 2, out + bytes([(number - last) << 4 | 5])
            while value > 127:
                out, value = out + bytes([value & 127 | 128]), value >> 7
            out += bytes([value])
        last = number
    return out + b"\0"


def chunk_of(data, values=10):
    meta = SimpleNamespace(
        data_page_offset=0, dictionary_page_offset=None, total_compressed_size=len(data), num_values=values,
        physical_type="BYTE_ARRAY", compression="ZSTD",
    )  # fmt: skip
    return Chunk(io.BytesIO(data), meta, True)


def test_headers_that_lie_take_no_memory():
    inner = header(f1=10, f2=0, f3=3, f4=3)
    (page,) = chunk_of(header(f1=0, f2=2**31 - 1, f3=5, f5=inner) + b"12345").pages()
    assert (page.kind, page.size, page.stored, page.values) == (DATA_PAGE, 2**31 - 1, 5, 10)
    assert parquet_limits._column(chunk_of(header(f1=0, f2=2**31 - 1, f3=5, f5=inner) + b"12345"), 1 << 30)[0] > 6e9
    words = header(f1=2, f2=100, f3=5, f7=header(f1=3, f2=0)) + b"12345"
    assert parquet_limits._column(chunk_of(words, 0), 1 << 30) == (0, 0)
    assert parquet_limits._column(chunk_of(words), 1 << 30)[1] == 100  # it does not unpack
    for damaged, what in [
        (b"\x15\0\x15", "no whole header"), (header(f1=0, f2=5), "without sizes"),
        (b"\x1c" * 99, "too many levels"), (b"\x19\x15", "type 9"), (b"\x15" + b"\xff" * 11, "more than 64 bits"),
        (header(f1=0, f2=5, f3=5, f5=5), "another kind"), (b"\x18\xff\xff\xff\xff\x0f", "no whole header"),
        (header(f1=3, f2=5, f3=5, f8=header(f1=1, f5=6, f6=6)), "contradicts itself"),
    ]:  # fmt: skip
        with pytest.raises(PageError, match=what):
            list(chunk_of(damaged).pages())


def test_memory_that_is_left_knows_the_limit_of_the_process():
    code = (
        "import resource; from gpu_etl.raw.parquet_limits import memory_left; before = memory_left();"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); assert memory_left() < 1 << 30 < before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_memory_that_runs_out_all_the_same_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "day", pa.array(["1"] * 10), 10)

    def fail(*_, **more):
        raise pa.ArrowMemoryError("no")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(DataError, match=r"day: too little memory to decode it \(no\); write it anew"):
        parsed(path)
