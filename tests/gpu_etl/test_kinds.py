"""Files that are no days are named for what they are; a day is taken whatever its name."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib

import pyarrow.parquet as pq
import pytest

from gpu_etl.common import codecs
from gpu_etl.common.errors import DataError
from gpu_etl.raw import kinds
from gpu_etl.raw.reader import open_sources, read_day
from tests.conftest import ROOT
from tests.gpu_etl.test_inputs import LINES, table_of, write_parquet
from tests.reference import write_rows

TEXT = write_rows(seed=3, rows=50)
HEADER = b"\t".join([b"label", *(b"I%d" % i for i in range(1, 14)), *(b"C%d" % i for i in range(1, 27))]) + b"\n"


def tar(text):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("day_0")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    return stream.getvalue()


def archive(text):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("day_0", text)
    return stream.getvalue()


def commas(text):
    return text.replace(b"\t", b",")


KINDS = {
    "UTF-16 text; convert it: `iconv -f UTF-16": TEXT.decode().encode("utf-16"),
    "UTF-16 text without a mark; convert it: `iconv -f UTF-16LE": TEXT.decode().encode("utf-16-le"),
    "UTF-16 text without a mark; convert it: `iconv -f UTF-16BE": TEXT.decode().encode("utf-16-be"),
    "UTF-32 text": TEXT.decode().encode("utf-32"),
    "text that begins with a byte order mark": b"\xef\xbb\xbf" + TEXT,
    "a zip archive; unpack it first: `unzip day`": archive(TEXT),
    "bzip2; unpack it first: `bunzip2 day`": bz2.compress(TEXT),
    "xz; unpack it first: `unxz day`": lzma.compress(TEXT),
    "a tar archive; unpack it first: `tar xf day`": tar(TEXT),
    "a tar archive inside gzip; unpack it first: `tar xf day`": gzip.compress(tar(TEXT)),
    "gzip inside gzip; unpack it once: `gunzip -c day > NEW`": gzip.compress(gzip.compress(TEXT)),
    "bzip2 inside gzip": gzip.compress(bz2.compress(TEXT)),
    "UTF-16 text inside gzip": gzip.compress(TEXT.decode().encode("utf-16")),
    "Parquet inside gzip": gzip.compress(b"PAR1" + TEXT),
    "zstd inside gzip": gzip.compress(b"\x28\xb5\x2f\xfd" + TEXT),
    "a web page .HTML., as of a failed download; fetch the data itself": b"\n<!DOCTYPE html><html><body>404",
    "XML, as of a failed download": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON; write its rows": json.dumps([{"label": 1}]).encode(),
    "a pointer of Git LFS, not the file itself; fetch it: `git lfs pull`":
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "text whose fields are separated by commas; convert it: `tr ',' '.t' < day`": commas(TEXT),
    "text whose fields are separated by commas with a header; convert it: `tail -n .2 day | tr ',' '.t'`":
        commas(HEADER + TEXT),
    "text whose fields are separated by bars": TEXT.replace(b"\t", b"|"),
    "a NumPy array .*train.py --dataset": b"\x93NUMPY\1\0" + bytes(200),
    "binary data; check which file was meant; records": bytes(range(160)) * 50,
    "Avro; write its rows as tab-separated text or as Parquet": b"Obj\1" + bytes(99),
}  # fmt: skip
if codecs.zstandard:
    pack = codecs.zstandard.compress
    KINDS |= {
        "zstd inside zstd; unpack it once: `zstd -dc day": pack(pack(TEXT)),
        "gzip inside zstd": pack(gzip.compress(TEXT)),
        "a tar archive inside zstd": pack(tar(TEXT)), "zstd inside gzip; unpack": gzip.compress(pack(TEXT)),
    }  # fmt: skip


@pytest.mark.parametrize("words", KINDS)
def test_what_is_no_day_is_named(tmp_path, words):
    (tmp_path / "day").write_bytes(KINDS[words])
    with pytest.raises(DataError, match=rf"day: expected rows of 40 tab-separated fields .* found {words}"):
        open_sources([tmp_path / "day"])


@pytest.mark.parametrize(("name", "content"), [
    ("day.gz", TEXT), ("day.parquet", TEXT), ("day.txt", gzip.compress(TEXT)), ("day.zip", TEXT[:-1]),
    ("day", b"\0\0bad\n<html>,\xff\n" + TEXT), ("day", b"{}\n" * 9 + TEXT.replace(b"\n", b"\r\n")),
    ("day", b"PKxyz\n" + TEXT), ("day", HEADER + TEXT), ("day", b"bad\n" * 20_000), ("day", b"x"),
    ("day", TEXT.partition(b"\t")[2].partition(b"\n")[0]),
])  # fmt: skip
def test_text_is_taken_whatever_its_name_and_its_bad_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (source,) = open_sources([tmp_path / name])
    text = gzip.decompress(content) if name == "day.txt" else content
    assert b"".join(slab.text.tobytes() for slab in read_day(source, 0, 1 << 20)) == text


@pytest.mark.parametrize("name", ["day_0.gz", "day_0.txt", "day_0.zst"])
def test_parquet_is_taken_under_any_name(tmp_path, name):
    path = write_parquet(tmp_path / name, table_of(LINES))
    (slab,) = read_day(*open_sources([path]), 0, 1 << 20)
    assert len(slab.batch) == len(LINES) == pq.read_metadata(path).num_rows


def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, words in [
        (tmp_path / "pipe", "found a pipe; days are read more than once.* write it to a file first"),
        ("-", "-: expected a day file .*, found -, which stands for no file here; days are read more than once"),
        ("/dev/null", "found a device; days are read more than once"), (tmp_path / "link", r"leads nowhere \(.*gone\)"),
        (tmp_path / "none", "found nothing$"), (tmp_path, "found a folder$"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_sources([path])


OPEN = "from gpu_etl.raw.reader import open_sources; print(open_sources(['/dev/stdin'])[0].path)"


def test_standard_input_is_the_file_that_it_comes_from_or_refused(tmp_path):
    (tmp_path / "day").write_bytes(TEXT)
    with open(tmp_path / "day", "rb") as file:
        done = subprocess.run([sys.executable, "-c", OPEN], stdin=file, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "day")
    done = subprocess.run([sys.executable, "-c", OPEN], input=TEXT, cwd=ROOT, capture_output=True)
    assert b"/dev/stdin: expected a day file (text, gzip, zstd or Parquet), found a pipe" in done.stderr


def member(text, name=b"", extra=None):
    flags = 8 * bool(name) + 4 * (extra is not None)
    fields = b"" if extra is None else len(extra).to_bytes(2, "little") + extra
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + fields + name + b"\0" * bool(name)
    sums = zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little")
    return head + packer.compress(text) + packer.flush() + sums


def read(path):
    return b"".join(slab.text.tobytes() for slab in read_day(*open_sources([path]), 0, 1 << 20))


def test_gzip_of_many_members_and_of_none_with_text(tmp_path):
    lines, path = TEXT.splitlines(keepends=True), tmp_path / "day.gz"
    for content, text in [
        (b"".join(member(line[i : i + 7]) for line in lines for i in range(0, len(line), 7)), TEXT),
        (member(b"") * 1000 + member(TEXT, b"day", b"x" * 65535) + member(b"") * 1000, TEXT),
        (member(b"") * 3, b""), (member(TEXT, b"n" * 500_000), TEXT), (member(TEXT) + bytes(1000), TEXT),
    ]:  # fmt: skip
        path.write_bytes(content)
        assert read(path) == text


@pytest.mark.skipif(codecs.igzip is None, reason="no isal: pip install isal")
def test_a_gzip_header_beyond_what_isal_reads(tmp_path, monkeypatch):
    for content in (member(TEXT, b"n" * 600_000), member(TEXT) + member(TEXT, b"n" * 600_000)):
        (tmp_path / "day.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"day\.gz: expected a gzip header .* more than 512 KiB.*pack it anew"):
            read(tmp_path / "day.gz")
    monkeypatch.setattr(codecs, "igzip", None)
    assert read(tmp_path / "day.gz") == TEXT * 2


def test_every_kind_has_words():
    assert all(kind.name and kind.remedy for kind in kinds._KINDS)
