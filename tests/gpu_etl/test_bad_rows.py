"""Rows that cannot be parsed: what they cost, which of them are told of, what counts as one."""

import gzip

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common import codecs
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import BadRowError, DataError
from gpu_etl.passes.bad_rows import SHOWN, BadRows
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw.reader import open_sources, read_day
from gpu_etl.raw.text import BLANK_BYTES
from gpu_etl.rows import faults, scalar as rows
from tests.reference import write_rows

GOOD = write_rows(seed=3, rows=200)


def slabs_of(path, slab_bytes=1 << 20, **more):
    """Prepared slabs of a day, those behind the rows that parse() gives among them; each must be parsed."""
    for slab in read_day(open_sources([path])[0], 0, slab_bytes, **more):
        slab.prepare(cpu)
        while slab is not None:
            yield slab
            slab = slab.rest(cpu)


def faults_of(path, slab_bytes=1 << 20, **more):
    return np.concatenate([slab.parse(cpu, ScratchBuffer())[2] for slab in slabs_of(path, slab_bytes, **more)])


class Described:
    """A slab that notes which rows are looked at again."""

    def __init__(self):
        self.rows = []

    def describe(self, rows_, codes):
        self.rows += rows_
        return [f"fault {code}" for code in codes]


CODES = np.array([0, 64, 0, 131, 64, *[200] * 1000], np.int32)


def test_only_rows_that_are_told_of_are_described():
    slab, said = Described(), []
    found = BadRows("skip", 5000).settle(slab, CODES, where=lambda row: f"row {row}", before=0, say=said.append)
    assert found == {"wrong number of fields": 2, "bad label": 1, "bad integer": 1000}
    assert slab.rows == [1, 3, 4, 5, 6] and len(said) == SHOWN and said[1] == "left out: row 3: fault 131"
    assert BadRows("skip", 5000).settle(slab, CODES, where=str, before=SHOWN, say=said.append)["bad integer"] == 1000
    assert len(slab.rows) == len(said) == SHOWN
    with pytest.raises(BadRowError, match=r"^1: fault 64\. Mend the file"):
        BadRows("error").settle(slab, CODES, where=str, before=0, say=said.append)
    with pytest.raises(BadRowError, match=r"^4: fault 64\. More than --max-bad-rows 9 such rows"):
        BadRows("skip", 9).settle(slab, CODES, where=str, before=7, say=said.append)
    assert slab.rows[SHOWN:] == [1, 4] and len(said) == SHOWN
    with pytest.raises(DataError, match="--bad-rows: expected error or skip"):
        BadRows("leave").check()


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"", b"a", b"ab" * 40]), min_size=1, max_size=60), st.booleans(), st.data())
def test_rows_are_found_where_they_are(lines, open_ended, data):
    text = np.frombuffer(b"\n".join(lines) + b"\n" * (not open_ended or not lines[-1]), np.uint8)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(lines) - 1))))
    faults.BLOCK_BYTES, before = data.draw(st.integers(1, 50)), faults.BLOCK_BYTES
    try:
        places = faults.places(text, wanted)
    finally:
        faults.BLOCK_BYTES = before
    assert [text[begin:end].tobytes() for begin, end in places] == [lines[row] for row in wanted]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_nothing_take_no_more_memory_than_good_ones(tmp_path, threads):
    lines = GOOD.splitlines(keepends=True)
    text = lines[0] + b"\n" * 300_000 + b"".join(lines[1:]) + b"x\n" * 200_000 + lines[0]
    (tmp_path / "day").write_bytes(text)
    memory, found, ends = ScratchBuffer(), [], []
    for slab in slabs_of(tmp_path / "day", 1 << 18, threads=threads):
        values, missing, codes = slab.parse(cpu, memory)
        found.append(codes)
        ends.append(slab.end)
        assert len(values) == len(missing) == len(codes) <= rows.most_rows(1 << 18) + 1
        for row in (0, len(codes) - 1):
            if codes[row]:
                assert "fields, got 1:" in slab.describe([row], [codes[row]])[0]
        slab.release()
    assert len(memory._bytes) < 6 << 18 and len(ends) > 60 and ends == sorted(set(ends)) and ends[-1] == len(text)
    good = np.flatnonzero(np.concatenate(found) == 0).tolist()
    assert good == [0, *range(300_001, 300_200), 500_200] and len(np.concatenate(found)) == 500_201
    for end in ends[::20]:
        assert text[end - 1 : end] == b"\n"
        rest = faults_of(tmp_path / "day", 1 << 18, skip=end)
        assert (rest == np.concatenate(found)[text[:end].count(b"\n") :]).all()


def test_a_day_of_bad_rows_and_one_of_newlines_are_encoded(tmp_path):
    lines = GOOD.splitlines(keepends=True)
    (tmp_path / "bad").write_bytes(b"".join(line if i % 10 < 3 else b"x" + line for i, line in enumerate(lines)))
    (tmp_path / "blank").write_bytes(lines[0] + b"\n" * 20_000 + lines[1])
    (tmp_path / "last").write_bytes(GOOD)
    days = [tmp_path / name for name in ("bad", "blank", "last")]
    found, _ = encode_days(days, tmp_path / "out", Settings(bad_rows="skip", max_bad_rows=20_140))
    assert [source["dropped"] for source in found.sources] == [
        {"bad label": 140}, {"wrong number of fields": 20_000}, {}
    ]  # fmt: skip
    with pytest.raises(BadRowError, match=r"blank: row 20001: .*More than --max-bad-rows 20139"):
        encode_days(days, tmp_path / "other", Settings(bad_rows="skip", max_bad_rows=20_139))


PACKED = {"plain": bytes, "gzip": gzip.compress}
if codecs.zstandard:
    PACKED["zstd"] = lambda text: codecs.zstandard.compress(text)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("blank", [b"\n", b"\n\n\n", b"\r\n", b"\r\n\r\n", b"\n\r\n\n", b"\n" * (BLANK_BYTES - 1)])
@pytest.mark.parametrize("slab_bytes", [1024, len(GOOD), len(GOOD) + 1, 1 << 20])
def test_blank_lines_at_the_end_are_no_rows(tmp_path, packed, blank, slab_bytes):
    (tmp_path / "day").write_bytes(PACKED[packed](GOOD + blank))
    for threads in (1, 3):
        assert faults_of(tmp_path / "day", slab_bytes, threads=threads).tolist() == [0] * 200
    assert list(slabs_of(tmp_path / "day", slab_bytes, skip=len(GOOD))) == []
    (tmp_path / "day").write_bytes(PACKED[packed](GOOD + blank + GOOD))  # not at the end
    for threads in (1, 3):
        assert (faults_of(tmp_path / "day", slab_bytes, threads=threads) != 0).sum() == blank.count(b"\n")
    (tmp_path / "day").write_bytes(PACKED[packed](blank))
    assert list(slabs_of(tmp_path / "day", slab_bytes)) == []


def test_a_part_of_a_file_ends_in_no_blank_lines(tmp_path):
    (tmp_path / "day").write_bytes(GOOD + b"\n\n" + GOOD)
    (source,) = open_sources([tmp_path / "day"])
    source.size = len(GOOD) + 2
    (slab,) = read_day(source, 0, 1 << 20)
    assert slab.text.tobytes() == GOOD + b"\n\n" and source.read == len(GOOD) + 2


def test_a_field_or_row_of_megabytes_is_shown_in_short():
    for row, words in [
        (b"\t" * 3_000_000, "expected 40 tab-separated fields, got 3000001: '" + " " * 80 + "'..."),
        (b"1\t" * 38 + b"x" * 3_000_000, "expected 40 tab-separated fields, got 39: '" + "1 " * 38 + "xxxx'..."),
        ("ü".encode() * 1000, "expected 40 tab-separated fields, got 1: '" + "ü" * 80 + "'..."),
    ]:
        text = np.frombuffer(row, np.uint8)
        assert faults.describe(text, 0, len(text), rows.FAULT_FIELDS * rows.FAULT_STRIDE) == words
