"""Day files cut into slabs, and the thread that reads ahead."""

import gzip
import os
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_etl import codecs
from gpu_etl.errors import DataError
from gpu_etl.extract import open_sources, read_day
from gpu_etl.memory import Pool
from gpu_etl.prefetch import Crew, in_order, prefetch
from gpu_etl.source import Source
from gpu_etl.text import read_plain
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


def slabs_of(path, slab_bytes, **more):
    (source,) = open_sources([path])
    return [slab.text.tobytes() for slab in read_day(source, 0, slab_bytes, **more)], source


@pytest.mark.parametrize("slab_bytes", [len(TEXT) * 2, len(TEXT) + 1, len(TEXT), len(TEXT) - 1, 1000, 700])
@pytest.mark.parametrize("text", [TEXT, TEXT[:-1]], ids=["newline at the end", "none"])
@pytest.mark.parametrize(("packed", "threads"), [(False, 1), (False, 4), (True, 1)])
def test_slabs_are_the_text_cut_at_newlines(tmp_path, slab_bytes, text, packed, threads):
    path = tmp_path / "day"
    path.write_bytes(gzip.compress(text) if packed else text)
    slabs, source = slabs_of(path, slab_bytes, threads=threads)
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


@pytest.mark.parametrize(("packed", "threads", "skip"), [(True, 1, 0), (False, 1, 0), (False, 3, 0), (False, 3, 1)])
def test_checksum_is_that_of_the_stored_bytes(tmp_path, packed, threads, skip):
    path = tmp_path / "day"
    path.write_bytes(gzip.compress(TEXT) if packed else TEXT)
    behind = TEXT.index(b"\n", 9000) + 1
    slabs, source = slabs_of(path, 4000, threads=threads, skip=behind * skip)
    assert source.crc32 == zlib.crc32(path.read_bytes()) and source.read == source.size
    assert b"".join(slabs) == TEXT[behind * skip :]


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_any_text_comes_whole_and_in_order_with_its_checksum(data, threads):
    lengths = data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=30))
    text = b"\n".join(b"%d" % (i % 10) * length for i, length in enumerate(lengths)) + b"\n" * data.draw(st.booleans())
    begin, end = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    rows = [m + 1 for m in range(begin, end) if text[m : m + 1] == b"\n"]
    skip = data.draw(st.sampled_from([begin, *rows])) - begin
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        source, prepared = Source(Path(file.name), end - begin, begin), []
        slabs = list(read_plain(
            source, 3, 1 + 701, skip, pool=Pool(), prepare=prepared.append, threads=threads
        ))  # fmt: skip
    assert b"".join(slab.text.tobytes() for slab in slabs) == text[begin + skip : end]
    assert [slab.end for slab in slabs] == np.cumsum([skip, *(len(slab.text) for slab in slabs)])[1:].tolist()
    assert all(slab.text.tobytes().endswith(b"\n") for slab in slabs[:-1])
    assert {id(slab) for slab in prepared} == {id(slab) for slab in slabs}
    assert (source.read, source.crc32) == (end - begin, zlib.crc32(text[begin:end]))


def test_memory_of_slabs_is_used_again(tmp_path):
    path = tmp_path / "day"
    path.write_bytes(TEXT)
    taken = []
    pool = Pool(lambda size: taken.append(size) or np.empty(size, np.uint8))
    for slab in read_day(open_sources([path])[0], 0, 3000, pool=pool, threads=3):
        slab.release()
    assert len(TEXT) > 40_000 and len(taken) <= 4 and set(taken) == {3000}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_becomes_shorter_meanwhile(tmp_path, threads):
    path = tmp_path / "day"
    path.write_bytes(TEXT)
    (source,) = open_sources([path])
    slabs = read_day(source, 0, 3000, threads=threads)
    next(slabs)
    cut = TEXT.index(b"\n", 20_000) + 1
    os.truncate(path, cut)
    with pytest.raises(DataError, match=rf"expected {len(TEXT)} bytes.* found an end behind \d+: it became shorter"):
        list(slabs)


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / "day.gz"
    path.write_bytes(gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:]))
    assert b"".join(slabs_of(path, 1 << 16)[0]) == TEXT


def test_row_longer_than_a_slab(tmp_path):
    path = tmp_path / "day"
    for before in (b"", b"a row\n" * 200):
        path.write_bytes(before + b"x" * 2000 + b"\n" + before)
        with pytest.raises(DataError, match=r"no end of row within 2000 bytes.*--slab-bytes"):
            slabs_of(path, 2000)
        assert b"".join(slabs_of(path, 2001)[0]) == path.read_bytes()


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


@pytest.mark.parametrize("threads", [1, 4])
def test_calls_are_made_side_by_side_and_come_in_order(threads):
    begun, meet = [], threading.Barrier(threads, timeout=10)

    def call(i):
        begun.append(i)
        if i < threads:
            meet.wait()  # breaks where fewer threads are at work
        return i

    found = in_order((lambda i=i: call(i) for i in range(50)), threads)
    assert next(found) == 0 and len(begun) <= threads
    assert list(found) == list(range(1, 50))


def test_an_error_comes_in_its_place_and_ends_the_threads():
    def call(i):
        if i == 5:
            raise KeyError("five")
        return i

    before, seen = threading.active_count(), []
    with pytest.raises(KeyError, match="five"):
        for i in in_order((lambda i=i: call(i) for i in range(50)), 3):
            seen.append(i)
    assert seen == list(range(5)) and threading.active_count() == before


def test_a_crew_is_done_with_every_part_before_an_error_is_raised():
    done, failed = [], threading.Event()

    def slow():
        failed.wait(10)
        done.append("slow")

    def fail(words):
        failed.set()
        raise OSError(words)

    with Crew(3) as crew, pytest.raises(OSError, match="one") as raised:
        crew.run([lambda: fail("one"), slow, lambda: fail("two")])
    assert done == ["slow"] and raised.value.__notes__ == ["meanwhile: OSError: two"]
