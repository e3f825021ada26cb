"""zstd days hold what the same rows hold as text."""

import zlib

import pytest

from gpu_etl.errors import DataError
from gpu_etl.extract import open_sources, read_day
from tests import reference

zstandard = pytest.importorskip("zstandard")

TEXT = reference.write_rows(seed=5, rows=300)


def text_of(path, slab_bytes=1 << 20, skip=0):
    (source,) = open_sources([path])
    slabs = [slab.text.tobytes() for slab in read_day(source, 0, slab_bytes, skip)]
    assert all(len(slab) <= slab_bytes and slab.endswith(b"\n") for slab in slabs)
    assert (source.read, source.crc32) == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    return b"".join(slabs)


def zstd(text, **options):
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(text)


NOTE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # a skippable frame, as pzstd writes


@pytest.mark.parametrize("packed", [
    zstd(TEXT), zstd(TEXT, write_content_size=False), zstd(TEXT[:5000]) + zstd(b"") + zstd(TEXT[5000:]),
    b"".join(zstd(TEXT[i : i + 100]) for i in range(0, len(TEXT), 100)),
    NOTE + zstd(TEXT[:70]) + NOTE + zstd(TEXT[70:]),
], ids=["one frame", "size unknown", "an empty frame", "many frames", "pzstd"])  # fmt: skip
def test_zstd_is_the_text(tmp_path, packed):
    path = tmp_path / "day"
    path.write_bytes(packed)
    for slab_bytes in (len(TEXT) + 1, len(TEXT), 1000):
        assert text_of(path, slab_bytes) == TEXT


def test_zstd_goes_on_behind_any_slab(tmp_path):
    path = tmp_path / "day"
    path.write_bytes(zstd(TEXT[:9999]) + zstd(TEXT[9999:]))
    ends = [slab.end for slab in read_day(open_sources([path])[0], 0, 5000)]
    assert len(ends) > 5 and ends[-1] == len(TEXT)
    for end in ends:
        assert text_of(path, 3000, skip=end) == TEXT[end:]


WHOLE = zstd(TEXT)
TWO = zstd(TEXT[:5000]) + zstd(TEXT[5000:])


@pytest.mark.parametrize("damaged", [
    WHOLE[:-1], WHOLE[:-5], WHOLE[: len(WHOLE) // 2], WHOLE[:5], TWO[:-1], TWO[: len(zstd(TEXT[:5000])) + 2],
    WHOLE[:-4] + b"sums", WHOLE[:50] + bytes(9) + WHOLE[59:], WHOLE + b"more", WHOLE[:4] + b"\xff" * 50,
], ids=["last byte", "checksum", "half", "header", "second frame", "second header", "wrong checksum", "middle", "tail",
        "no frame"])  # fmt: skip
def test_damaged_zstd(tmp_path, damaged):
    path = tmp_path / "day.zst"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"day\.zst: damaged or cut-off zstd file \(.+\); fetch it again"):
        text_of(path)


def test_zstd_of_text_that_packs_well_is_unpacked_bit_by_bit(tmp_path):
    path = tmp_path / "day.zst"
    path.write_bytes(zstd(b"\n" * (200 << 20)))
    read = [source.read for source in open_sources([path]) for _ in read_day(source, 0, 1 << 20)]
    assert len(read) >= 200
