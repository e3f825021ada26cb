"""Day files cut into slabs, and the thread that reads ahead."""

import gzip
import threading

import pytest

from gpu_etl import codecs
from gpu_etl.errors import DataError
from gpu_etl.extract import open_sources, read_day
from gpu_etl.prefetch import prefetch
from tests.reference import write_rows

TEXT = write_rows(seed=3, rows=200)


@pytest.fixture(params=["isal", "zlib"], autouse=True)
def library(request, monkeypatch):
    """What inflates and checks: isal, and what stands in for it where it is not installed."""
    if request.param == "zlib":
        monkeypatch.setattr(codecs, "isal_zlib", None)
        monkeypatch.setattr(codecs, "igzip", None)
    elif codecs.igzip is None:
        pytest.skip("no isal: pip install isal")


def slabs_of(path, slab_bytes):
    (source,) = open_sources([path])
    return [slab.text.tobytes() for slab in read_day(source, 0, slab_bytes)], source


@pytest.mark.parametrize("slab_bytes", [len(TEXT) * 2, len(TEXT) + 1, len(TEXT), len(TEXT) - 1, 1000, 700])
@pytest.mark.parametrize("text", [TEXT, TEXT[:-1]], ids=["newline at the end", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_slabs_are_the_text_cut_at_newlines(tmp_path, slab_bytes, text, packed):
    path = tmp_path / "day"
    path.write_bytes(gzip.compress(text) if packed else text)
    slabs, source = slabs_of(path, slab_bytes)
    assert b"".join(slabs) == text
    assert all(slab.endswith(b"\n") for slab in slabs[:-1])
    assert all(0 < len(slab) <= slab_bytes for slab in slabs)
    assert source.read == source.size == path.stat().st_size


@pytest.mark.parametrize("packed", [False, True])
def test_reading_goes_on_behind_any_slab(tmp_path, packed):
    path = tmp_path / "day"
    path.write_bytes(gzip.compress(TEXT) if packed else TEXT)
    (source,) = open_sources([path])
    ends = [slab.end for slab in read_day(source, 0, 5000)]
    assert len(ends) > 5 and ends[-1] == len(TEXT)
    for end in ends:
        rest = b"".join(slab.text.tobytes() for slab in read_day(open_sources([path])[0], 0, 3000, skip=end))
        assert rest == TEXT[end:]


def test_checksum_is_that_of_the_stored_bytes(tmp_path):
    import zlib

    path = tmp_path / "day.gz"
    path.write_bytes(gzip.compress(TEXT))
    _, source = slabs_of(path, 4000)
    assert source.crc32 == zlib.crc32(path.read_bytes())


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / "day.gz"
    path.write_bytes(gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:]))
    assert b"".join(slabs_of(path, 1 << 16)[0]) == TEXT


def test_row_longer_than_a_slab(tmp_path):
    path = tmp_path / "day"
    path.write_bytes(b"x" * 3000 + b"\n")
    with pytest.raises(DataError, match=r"no end of row within 2000 bytes.*--slab-bytes"):
        slabs_of(path, 2000)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[: len(b) // 2], lambda b: b[:50] + b"\0\1\2" + b[53:],
                                    lambda b: b[:-8] + bytes(4) + b[-4:]])  # fmt: skip
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "day.gz"
    path.write_bytes(damage(gzip.compress(TEXT)))
    with pytest.raises(DataError, match=r"day\.gz: damaged or cut-off gzip"):
        slabs_of(path, 1 << 20)


def test_inputs_that_cannot_be_days(tmp_path):
    day = tmp_path / "day"
    day.write_bytes(TEXT)
    (tmp_path / "empty").touch()
    for inputs, words in [
        ([tmp_path / "none"], "found nothing"),
        ([tmp_path], "found a folder"),
        ([tmp_path / "empty"], "is empty"),
        ([day, tmp_path / "." / "day"], "named twice"),
    ]:
        with pytest.raises(DataError, match=words):
            open_sources(inputs)


def test_prefetch_keeps_order_and_hands_over_errors():
    def items():
        yield from range(20)
        raise KeyError("from the thread")

    seen = []
    with pytest.raises(KeyError, match="from the thread"):
        for item in prefetch(items()):
            seen.append(item)
    assert seen == list(range(20))


def test_prefetch_reads_no_further_than_its_depth_and_its_thread_ends():
    made = []
    before = threading.active_count()
    items = prefetch((made.append(i) or i for i in range(1000)), depth=2)
    assert next(items) == 0
    items.close()
    assert len(made) <= 5
    assert threading.active_count() == before
