"""Raw days in the ids of a data set: values that it has no id for, rows without labels."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpu_etl.common.errors import BadRowError, DataError
from gpu_etl.load.raw import RawDay
from gpu_etl.passes.bad_rows import BadRows
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import COLUMN_NAMES, choose_preset
from tests.gpu_etl.test_inputs import LINES, table_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mlperf", "count"])
def data_set(request, day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / request.param
    encode_days(day_files, out, Settings(preset=choose_preset(request.param)))
    return out


@pytest.fixture
def new_day(day_files, tmp_path):
    """The last day, the first three rows of it with values that no day has in C2, the second also in C26."""
    lines = [line.split("\t") for line in day_files[2].read_text().splitlines()]
    for row in range(3):
        lines[row][15] = f"dead000{row}"
    lines[1][39] = "deadbeef"
    (tmp_path / "new").write_text("".join("\t".join(line) + "\n" for line in lines))
    return tmp_path / "new"


def sparse(day):
    return np.concatenate([batch.sparse.numpy() for batch in day.batches(CPU)])


def test_values_without_an_id_are_counted_and_get_what_the_rule_says(data_set, new_day, day_files):
    before, rare = RawDay(data_set, day_files[2]), RawDay(data_set, new_day)
    as_it_was, found = sparse(before), sparse(rare)
    known, with_new = before.unseen_report(), rare.unseen_report()
    assert (found[:3, 1] == 0).all() and found[1, 25] == 0
    assert (found[3:] == as_it_was[3:]).all()
    mlperf = data_set.name == "mlperf"
    assert known == {} or not mlperf  # it keeps every value; by "count", rare ones have no id either
    if mlperf:
        assert with_new == {"C2": 3, "C26": 1}
        assert rare.unseen_words() == (
            f"4 of {26 * 251:,} category values have no id in the data set: they became id 0, which is an ordinary "
            "value's in this data set (see --unseen)"
        )
        assert before.unseen_words() == "all category values have ids in the data set's vocabulary"
    else:
        assert rare.unseen_words().endswith("they became id 0")
    popular = sparse(RawDay(data_set, new_day, "popular"))
    with np.load(data_set / "vocabulary.npz") as arrays:
        most = int(arrays["first_id"]) + np.array([np.argmax(arrays[f"C{c}_counts"]) for c in range(1, 27)])
    assert (popular[:3, 1] == most[1]).all() and popular[1, 25] == most[25]
    changed = popular != found
    assert changed.sum() <= rare.unseen_values.sum() and (popular[changed] == np.tile(most, (251, 1))[changed]).all()
    if mlperf:
        with pytest.raises(DataError, match=r"new: row 1: column C2: the value dead0000 has no id .*--unseen rare"):
            sparse(RawDay(data_set, new_day, "error"))
        assert (sparse(RawDay(data_set, day_files[2], "error")) == as_it_was).all()
    with pytest.raises(DataError, match="--unseen: expected one of rare, popular, error, got 'any'"):
        RawDay(data_set, new_day, "any")


@pytest.mark.parametrize("named", [True, False])
def test_parquet_without_labels(data_set, tmp_path, named):
    text = tmp_path / "text"
    text.write_text("".join("\t".join(line[1:]) + "\n" for line in LINES))
    order = sorted(range(1, 40), key=lambda c: COLUMN_NAMES[c]) if named else range(1, 40)
    names = [COLUMN_NAMES[c] if named else f"x{c}" for c in order]
    pq.write_table(pa.table([table_of(LINES)[c] for c in order], names), tmp_path / "day.parquet")
    days = [RawDay(data_set, tmp_path / name) for name in ("text", "day.parquet")]
    assert not any(day.labelled for day in days)
    for a, b in zip(*(list(day.batches(CPU)) for day in days), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_raw_day_that_is_cut_while_it_is_read(data_set, day_files, tmp_path):
    path = tmp_path / "day"
    text = day_files[0].read_bytes() * 60
    path.write_bytes(text)
    batches = RawDay(data_set, path).batches(CPU)
    next(batches)
    path.write_bytes(text[: text.index(b"\n", len(text) - 2000) + 1])
    with pytest.raises(DataError, match=r"day: expected .* bytes, as when it was opened, found an end behind"):
        list(batches)


def texts_of(path, labelled):
    lines = [line if labelled else line.partition("\t")[2] for line in path.read_text().splitlines()]
    return [line + "\n" for line in lines]


@pytest.mark.parametrize("labelled", [True, False])
def test_bad_rows_end_it_or_are_left_out(data_set, day_files, tmp_path, labelled, capsys):
    good, path = texts_of(day_files[2], labelled), tmp_path / "day"
    path.write_text("".join(["a\tb\n", *good[:100], good[0].partition("\t")[2], "\n", *good[100:]]) + "\r\n\n")
    fields, shown = (40, "39: '") if labelled else (39, "38: '")
    with pytest.raises(BadRowError, match=rf"day: row 1: expected {fields} tab-separated fields, got 2: 'a b'. Mend"):
        sparse(RawDay(data_set, path))
    day = RawDay(data_set, path, bad_rows=BadRows("skip", 3))
    (tmp_path / "good").write_text("".join(good))
    assert day.labelled == labelled
    assert (sparse(day) == sparse(RawDay(data_set, tmp_path / "good"))).all()
    assert day.dropped == {"wrong number of fields": 3} and day.bad_row_numbers == [1, 102, 103] and day.rows == 251
    said, own = capsys.readouterr().err, good[0].partition("\t")[2].replace("\t", " ")[:80]
    assert f"left out: {path}: row 102: expected {fields} tab-separated fields, got {shown}{own}'..." in said
    with pytest.raises(BadRowError, match=r"day: row 103: .*got 1: ''\. More than --max-bad-rows 2 such rows"):
        sparse(RawDay(data_set, path, bad_rows=BadRows("skip", 2)))
    if data_set.name == "mlperf":
        lines = [*good[:100], good[100].rpartition("\t")[0] + "\tdeadbeef\n"]
        path.write_text("".join(["a\tb\n", *lines]))
        with pytest.raises(DataError, match="day: row 102: column C26: the value deadbeef has no id"):
            sparse(RawDay(data_set, path, "error", BadRows("skip")))


def test_a_bad_field_of_a_row_without_a_label_is_shown(data_set, tmp_path):
    fields = LINES[0][1:]
    (tmp_path / "day").write_text("\t".join([*fields[:13], "wxyz", *fields[14:]]))
    with pytest.raises(BadRowError, match="row 1: column C1: expected up to 8 hex digits or nothing, got 'wxyz'"):
        sparse(RawDay(data_set, tmp_path / "day"))


def test_the_smallest_integer_is_that_of_good_rows(day_files, tmp_path, capsys):
    encode_days(day_files, tmp_path / "set", Settings(preset=choose_preset("torchrec")))
    good, path = texts_of(day_files[2], True), tmp_path / "day"
    path.write_text("".join([*good[:100], "0\t-9999999" + "\t" * 37 + "\n", *good[100:]]))
    days = RawDay(tmp_path / "set", path, bad_rows=BadRows("skip")), RawDay(tmp_path / "set", day_files[2])
    for a, b in zip(*(list(day.batches(CPU)) for day in days), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert capsys.readouterr().err.count("left out") == 1
