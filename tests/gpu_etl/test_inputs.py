"""Files, patterns and folders of days; Parquet days hold what the same rows hold as text."""

import random
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError
from gpu_etl.raw import columns
from gpu_etl.raw.parquet import ParquetSlab
from gpu_etl.raw.paths import expand, list_days
from gpu_etl.raw.reader import open_sources, read_day
from gpu_etl.rows import scalar as rows
from tests import reference

TEXT = reference.write_rows(seed=5, rows=300)
LINES = [line.split("\t") for line in TEXT.decode().splitlines()]
ROWS = reference.read_rows(TEXT)
KINDS = {
    reference.LABEL: rows.FAULT_LABEL, reference.INTEGER: rows.FAULT_INTEGER, reference.RANGE: rows.FAULT_RANGE,
    reference.HEX: rows.FAULT_HEX,
}  # fmt: skip
LABEL, DENSE, SPARSE = range(1), range(1, 14), range(14, 40)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def names(paths):
    return [path.name for path in paths]


def test_a_folder_stands_for_its_days_in_natural_order(tmp_path):
    days = ["day_0", "day_1.gz", "day_2.zst", "day_3.tsv", "day_10.txt", "day_11.parquet", "day_12.tsv.gz"]
    touch(tmp_path, *days, "day_0.probability.npy", "truth.json", ".day_4", "train.txt")
    (tmp_path / "other").mkdir()
    assert expand([tmp_path]) == expand([str(tmp_path)]) == [tmp_path / day for day in days]


def test_a_folder_without_day_names_stands_for_all_files_with_the_endings(tmp_path):
    touch(tmp_path, "piece-10.parquet", "piece-9.parquet", "train", "README.md")
    touch(tmp_path, "_SUCCESS", ".crc")
    assert names(expand([tmp_path])) == ["piece-9.parquet", "piece-10.parquet", "train"]


def test_patterns_are_sorted_naturally_and_words_keep_their_order(tmp_path):
    touch(tmp_path, *(f"day_{day}.gz" for day in (10, 9, 2, 1)), "last")
    (tmp_path / "day_x.gz").mkdir()
    pattern = str(tmp_path / "day_*.gz")
    expected = ["last", "day_1.gz", "day_2.gz", "day_9.gz", "day_10.gz"]
    assert names(expand([tmp_path / "last", pattern])) == expected
    assert names(expand([pattern, tmp_path / "last"])) == expected[1:] + expected[:1]
    touch(tmp_path / "b10", "x"), touch(tmp_path / "b9", "y")
    assert names(expand([tmp_path / "b*" / "*"])) == ["y", "x"]


def test_names_of_files_are_kept_as_they_are(tmp_path):
    touch(tmp_path, "day_[0]", "day_0", "truth.json")
    paths = [tmp_path / "day_[0]", tmp_path / "truth.json", tmp_path / "none"]
    assert expand(paths) == paths
    with pytest.raises(DataError, match=r"none: expected a day file .*found nothing"):
        open_sources(expand([tmp_path / "none"]))


def test_words_that_yield_nothing(tmp_path):
    touch(tmp_path, "truth.json", ".day_0")
    with pytest.raises(DataError, match=r"expected day files in the folder .*found none; name the files"):
        expand([tmp_path])
    with pytest.raises(DataError, match=r"day_\*: expected a pattern of day files, found no file"):
        expand([tmp_path / "day_*"])


def test_a_day_that_lies_twice_in_a_folder(tmp_path):
    touch(tmp_path, "day_0", "day_1", "day_1.tsv.gz")
    with pytest.raises(DataError, match=r"found both day_1 and day_1\.tsv\.gz; delete one"):
        expand([tmp_path])


# Ways to keep a column in Parquet: (which columns, Arrow type, what becomes of a field of text).
def signed(bits):
    """The int32 of the same bits."""
    return bits - 2**32 if bits >= 2**31 else bits


def either(null):
    """The field as it is; empty ones are null or the empty string."""
    return lambda field: field or null


def decimal(field):
    return int(field) if field else None


def hexadecimal(field):
    return int(field, 16) if field else None


WAYS = {
    "label": [(pa.int8(), int), (pa.int64(), int), (pa.uint32(), int), (pa.bool_(), lambda field: field == "1")],
    "dense": [(pa.int32(), decimal), (pa.int64(), decimal), (pa.float64(), decimal),
              (pa.float64(), lambda field: float(field or "nan")), (pa.dictionary(pa.int8(), pa.int32()), decimal)],
    "sparse": [(pa.string(), either(None)), (pa.string(), either("")), (pa.large_string(), either(None)),
               (pa.string(), lambda field: field.upper() or None), (pa.string_view(), either(None)),
               (pa.dictionary(pa.int16(), pa.string()), either(None)),
               (pa.int32(), lambda field: signed(int(field, 16)) if field else None),
               (pa.uint32(), hexadecimal), (pa.int64(), hexadecimal), (pa.uint64(), hexadecimal)],
}  # fmt: skip


def array_of(fields, kind, convert):
    values = [convert(field) for field in fields]
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def write_parquet(path, arrays, **options):
    pq.write_table(pa.table(arrays, [f"column {i}" for i in range(len(arrays))]), path, **options)
    return path


def table_of(lines, label=0, dense=0, sparse=0):
    """40 arrays of the lines, kept in the numbered ways."""
    ways = [WAYS["label"][label]] + 13 * [WAYS["dense"][dense]] + 26 * [WAYS["sparse"][sparse]]
    return [array_of(fields, *way) for fields, way in zip(zip(*lines, strict=True), ways, strict=True)]


def parsed(path, slab_bytes=1 << 20, skip=0):
    """(rows as lists of 40 values or None, fault codes, slabs); the checksum is checked on the way."""
    (source,) = open_sources([path])
    found, codes, slabs = [], [], []
    for slab in read_day(source, 3, slab_bytes, skip):
        values, missing, faults = slab.parse(cpu, ScratchBuffer())
        assert (values.dtype, missing.dtype, faults.dtype) == (np.uint32, np.uint64, np.int32)
        assert len(values) == len(missing) == len(faults) > 0 and slab.day == 3
        for row, mask in zip(values.tolist(), missing.tolist(), strict=True):
            assert not any(value for column, value in enumerate(row) if mask >> column & 1), "empty fields are 0"
            row = row[:1] + [signed(value) for value in row[1:14]] + row[14:]
            found.append([None if mask >> column & 1 else value for column, value in enumerate(row)])
        codes += faults.tolist()
        slabs.append(slab)
    assert (source.read, source.crc32) == (path.stat().st_size, zlib.crc32(path.read_bytes()))
    return found, codes, slabs


@pytest.mark.parametrize(("part", "way"), [(part, way) for part in WAYS for way in range(len(WAYS[part]))])
def test_parquet_holds_what_the_text_holds(tmp_path, part, way):
    path = write_parquet(tmp_path / "day", table_of(LINES, **{part: way}), row_group_size=70)
    for slab_bytes in (1 << 20, 256 * 33, 1):
        found, codes, slabs = parsed(path, slab_bytes)
        assert found == ROWS and not any(codes)
        assert max(len(slab.batch) for slab in slabs) <= max(1, slab_bytes // 256)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.uint8(), pa.uint16(), pa.float16(), pa.float32()], ids=str)
def test_parquet_of_small_types(tmp_path, kind):
    numbers = [0, 5, None, 100] + ([] if pa.types.is_unsigned_integer(kind) else [-100])
    label = pa.array([1] * len(numbers))
    sparse = pa.array(numbers, kind if pa.types.is_integer(kind) else pa.int32())
    found, codes, _ = parsed(write_parquet(tmp_path / "day", [label] + 13 * [pa.array(numbers, kind)] + 26 * [sparse]))
    bits = [number and number % 2**32 for number in numbers]
    assert not any(codes)
    assert found == [[1] + 13 * [number] + 26 * [key] for number, key in zip(numbers, bits, strict=True)]


def test_parquet_columns_of_nothing(tmp_path):
    path = write_parquet(tmp_path / "day", [pa.array([True, False])] + 39 * [pa.nulls(2)])
    found, codes, _ = parsed(path)
    assert not any(codes) and found == [[label] + 39 * [None] for label in (1, 0)]


def test_null_strings_may_have_bytes():
    offsets, data, valid = np.array([0, 1, 2, 3], np.int32), b"1z2", bytes([0b101])
    strings = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(data), pa.py_buffer(valid))
    batch = pa.RecordBatch.from_arrays(14 * [pa.array([1, 1, 1])] + 26 * [strings], [str(i) for i in range(40)])
    values, missing, faults = ParquetSlab(0, 3, batch).parse(cpu, ScratchBuffer())
    assert not faults.any() and missing.tolist() == [0, (1 << 40) - (1 << 14), 0]
    assert values[:, 14:].tolist() == [26 * [1], 26 * [0], 26 * [2]]


def test_parquet_goes_on_behind_any_slab(tmp_path):
    path = write_parquet(tmp_path / "day", table_of(LINES), row_group_size=70)
    ends = [slab.end for slab in parsed(path, 256 * 33)[2]]
    assert len(ends) > 8 and ends[-1] == len(ROWS)
    for end in [*ends, 70, 140]:
        found, _, slabs = parsed(path, 256 * 20, skip=end)
        assert found == ROWS[end:]
        assert [slab.end for slab in slabs][-1:] == ([len(ROWS)] if end < len(ROWS) else [])


def test_parquet_is_read_bit_by_bit(tmp_path):
    path = write_parquet(tmp_path / "day", table_of(LINES * 100), row_group_size=1000)
    (source,) = open_sources([path])
    read = [source.read for _ in read_day(source, 0, 256 * 1000)]
    assert len(read) == 30 and read[-1] == source.size
    np.testing.assert_allclose(read, source.size * np.arange(1, 31) / 30, atol=1)


def row_of(changes):
    fields = list("1" * 40)
    for column, field in changes.items():
        fields[column] = field
    return fields


FAULTS = [  # the row as text -> the same in Parquet, by column
    ({0: "2"}, {0: pa.array([2])}), ({0: "-1"}, {0: pa.array([-1], pa.int8())}),
    ({0: ""}, {0: pa.array([None], pa.int32())}), ({0: ""}, {0: pa.array([None], pa.bool_())}),
    ({0: str(2**63)}, {0: pa.array([2**63], pa.uint64())}),
    ({1: str(2**31)}, {1: pa.array([2**31])}), ({13: str(-(2**31) - 1)}, {13: pa.array([-(2**31) - 1])}),
    ({4: str(2**32)}, {4: pa.array([2**32], pa.uint64())}), ({4: str(2**31)}, {4: pa.array([2**31], pa.uint32())}),
    ({2: "1.5"}, {2: pa.array([1.5])}), ({2: "inf"}, {2: pa.array([np.inf])}),
    ({2: str(2**31)}, {2: pa.array([2.0**31])}), ({2: str(-(10**30))}, {2: pa.array([-1e30])}),
    ({2: "3000000000.5"}, {2: pa.array([3000000000.5])}), ({2: "0.5"}, {2: pa.array([0.5], pa.float32())}),
    ({14: "g"}, {14: pa.array(["g"])}), ({39: "1234567g"}, {39: pa.array(["1234567g"], pa.large_string())}),
    ({39: "123456789"}, {39: pa.array(["123456789"])}), ({20: "12345678x"}, {20: pa.array(["12345678x"])}),
    ({20: " 1"}, {20: pa.array([" 1"]).dictionary_encode()}), ({20: "1\n"}, {20: pa.array(["1\n"])}),
    ({20: "é"}, {20: pa.array(["é"])}), ({20: "-1"}, {20: pa.array(["-1"])}),
    ({20: "1" + "0" * 8}, {20: pa.array([2**32])}), ({20: "1" + "0" * 8}, {20: pa.array([2**32], pa.uint64())}),
    ({20: "f" * 9}, {20: pa.array([-(2**31) - 1])}),
    ({5: "1.5", 20: "g", 13: str(2**31)}, {5: pa.array([1.5]), 20: pa.array(["g"]), 13: pa.array([2**31])}),
    ({0: "7", 39: "g"}, {0: pa.array([7]), 39: pa.array(["g"])}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arrays"), FAULTS)
def test_parquet_faults_are_those_of_the_text(tmp_path, changes, arrays):
    _, (kind, column) = reference.parse_row("\t".join(row_of(changes)).encode())
    table = table_of([row_of({})])
    for place, array in arrays.items():
        table[place] = array
    _, codes, (slab,) = parsed(write_parquet(tmp_path / "day", table))
    assert codes == [KINDS[kind] * rows.FAULT_STRIDE + column]
    name = ["label", *(f"I{i}" for i in DENSE), *(f"C{i - 13}" for i in SPARSE)][column]
    value = arrays[column].to_pylist()[0]
    assert slab.describe([0], codes)[0].startswith(f"column {name}: expected ")
    assert slab.describe([0], codes)[0].endswith(f", got {value!r}")


@pytest.mark.parametrize("field", ["\t", "12\t", "\t12", "1234567\t", "12345678\t", "123456789\tx"])
def test_a_tab_is_no_hex_digit(tmp_path, field):
    table = table_of([row_of({}), row_of({14: field}), row_of({})])
    found, codes, _ = parsed(write_parquet(tmp_path / "day", table))
    assert codes == [0, rows.FAULT_HEX * rows.FAULT_STRIDE + 14, 0]
    assert found[0] == found[2] == reference.parse_row("\t".join(row_of({})).encode())[0]


def test_long_and_broken_strings_are_shown_in_short(tmp_path):
    table = table_of([row_of({14: "x" * 1000})])
    broken = pa.array([b"\xff\xfe"]).view(pa.string())
    for column, array, shown in [(14, table[14], r"got 'x{79}\.\.\.$"), (15, broken, "got '\ufffd\ufffd'$")]:
        arrays = table_of([row_of({})])
        arrays[column] = array
        _, (code,), (slab,) = parsed(write_parquet(tmp_path / "day", arrays))
        with pytest.raises(DataError, match=shown):
            raise DataError(slab.describe([0], [code])[0])


ONE = table_of(LINES[:1])


@pytest.mark.parametrize(("arrays", "words"), [
    (table_of(LINES)[:39], r"expected 40 columns .*got 39: column 0, column 1"),
    ([*ONE, pa.array([1])], "expected 40 columns .*got 41"),
    ([pa.array(["1"]), *ONE[1:]], r"column 1 \('column 0'\), which is label .*integers or bools.*type string"),
    ([pa.array([1.0]), *ONE[1:]], r"column 1 \('column 0'\), which is label .*type double"),
    ([pa.nulls(1), *ONE[1:]], r"which is label .*type null"),
    (ONE[:1] + 39 * [pa.array(["1"])], r"column 2 \('column 1'\), which is I1 .*whole numbers, got the type string"),
    ([*ONE[:39], pa.array([1.0])], r"column 40 \('column 39'\), which is C26 .*hex strings or.*type double"),
    ([*ONE[:39], pa.array([[1]])], r"which is C26 .*hex strings or.*type list"),
])  # fmt: skip
def test_parquet_of_other_columns(tmp_path, arrays, words):
    path = write_parquet(tmp_path / "day.parquet", arrays)
    with pytest.raises(DataError, match=r"day\.parquet: .*" + words):
        parsed(path)


DAMAGED = r"day\.parquet: damaged or cut-off Parquet file \((?s:.+)\); fetch it again"


def test_cut_off_parquet(tmp_path):
    path = write_parquet(tmp_path / "day.parquet", table_of(LINES))
    whole = path.read_bytes()
    for damaged in [whole[:-1], whole[:-8], whole[: len(whole) // 2], b"PAR1", whole[:-8] + b"\xff\xff\xff\x7fPAR1"]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=DAMAGED):
            parsed(path)


def test_damaged_parquet_is_told_or_read_as_it_was(tmp_path):
    path = write_parquet(tmp_path / "day.parquet", table_of(LINES), write_page_checksum=True)
    whole = path.read_bytes()
    rand = random.Random(1)
    told = 0
    names = [spot for spot in range(len(whole)) if whole.startswith(b"column 39", spot)]
    for spot in [rand.randrange(len(whole)) for _ in range(40)] + names:
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 255]) + whole[spot + 1 :])
        try:
            found = parsed(path)[0]
        except DataError as error:
            told += 1
            last = error
        else:
            assert found == ROWS  # statistics, names and the like
    assert told > 30
    with pytest.raises(DataError, match=DAMAGED):
        raise last


def test_parquet_of_another_number_of_rows_than_its_footer_says(tmp_path):
    path = write_parquet(tmp_path / "day.parquet", table_of(LINES))
    whole, footer = path.read_bytes(), 0
    number = b"\xd8\x04"  # 300, as the footer spells it
    spots = [i for i in range(len(whole)) if whole.startswith(number, i)]
    for spot in spots:
        path.write_bytes(whole[:spot] + b"\xd6\x04" + whole[spot + 2 :])
        try:
            assert parsed(path)[0] == ROWS
        except DataError as error:
            footer += "rows by its footer" in str(error)
    assert footer


def link(folder, name):
    (folder / name).symlink_to(folder.parent / "not_mounted" / name)


def subfolder(folder, name):
    (folder / name).mkdir()


@pytest.mark.parametrize(("name", "make", "words"), [
    ("day_2", link, r"day_2: it looks like a day, but the link leads nowhere \(.*not_mounted/day_2\)"),
    ("day_2.csv", touch, r"day_2\.csv: it looks like a day, but is not called like one"),
    ("Day_2", touch, r"Day_2: it looks like a day, but is not called like one"),
    ("day_2.bz2", touch, r"day_2\.bz2: it looks like a day, but is not called like one"),
    ("day2", touch, r"day2: it looks like a day, but is not called like one"),
    ("day-2", touch, r"day-2: it looks like a day, but is not called like one"),
    ("day_2", subfolder, r"day_2: it looks like a day, but is a folder without part files"),
])  # fmt: skip
def test_a_day_that_would_be_left_out_is_an_error(tmp_path, name, make, words):
    days = touch(tmp_path / "mix", "day_0", "day_1")
    make(days, name)
    with pytest.raises(DataError, match=words):
        expand([days])
    if name.startswith("day_2") and make is not touch:
        with pytest.raises(DataError, match=words):
            expand([days / "day_*"])


def test_what_else_is_left_out_is_said(tmp_path, capsys):
    touch(tmp_path, "day_0.gz", "day_1", "day_4", "day_1.npy", "train.txt")
    assert names(expand([tmp_path])) == ["day_0.gz", "day_1", "day_4"]
    said = capsys.readouterr().err
    assert "left out: day_1.npy, train.txt" in said and "there is none of number 2, 3" in said


def test_a_pattern_that_holds_a_day_twice(tmp_path):
    touch(tmp_path, "day_0", "day_0.gz", "day_1")
    with pytest.raises(DataError, match=r"day_\*: expected each day once, found both day_0 and day_0\.gz"):
        expand([tmp_path / "day_*"])


def test_the_list_of_days_is_short_and_has_both_ends(tmp_path):
    days = [tmp_path / f"day_{day}" for day in range(200)]
    said = list_days(days)
    assert said.startswith(f"200 days, first {days[0]}, last {days[-1]}: day_0, day_1,") and "170 more" in said
    assert len(said) < 700 and list_days(days[:1]) == f"one file: {days[0]}"


NAMES = ["label", *(f"I{i}" for i in DENSE), *(f"C{i - 13}" for i in SPARSE)]


def named(folder, names, arrays):
    path = folder / "day"
    pq.write_table(pa.table(arrays, names), path, row_group_size=70)
    return path


@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
def test_named_columns_may_lie_in_any_order(tmp_path, spell):
    order = sorted(range(40), key=lambda c: NAMES[c])  # C1, C10, C11, ...
    table = table_of(LINES)
    path = named(tmp_path, [spell(NAMES[c]) for c in order], [table[c] for c in order])
    for skip in (0, 100):
        found, codes, _ = parsed(path, 256 * 33, skip)
        assert found == ROWS[skip:] and not any(codes)


@pytest.mark.parametrize("scheme", columns.SCHEMES[1:], ids=lambda scheme: scheme[1])
def test_names_of_other_tools_in_any_order(tmp_path, scheme):
    order = sorted(range(40), key=lambda c: scheme[c])
    table = table_of(LINES)
    assert parsed(named(tmp_path, [scheme[c] for c in order], [table[c] for c in order]))[0] == ROWS


def test_columns_beside_the_named_ones_are_left_out_and_that_is_said(tmp_path, capsys):
    columns._say.cache_clear()
    index = pa.array([[i] for i in range(len(LINES))])
    path = named(tmp_path, ["__index_level_0__", *reversed(NAMES)], [index, *reversed(table_of(LINES))])
    assert parsed(path)[0] == ROWS == parsed(path)[0]
    assert capsys.readouterr().err.count("columns left out, as their names are none of label, I1 ... C26: __index") == 1


def test_columns_told_by_place_are_said(tmp_path, capsys):
    columns._say.cache_clear()
    assert parsed(write_parquet(tmp_path / "day", table_of(LINES)))[0] == ROWS
    assert "columns told by their place, as their names say nothing: column 0, column 1" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "words"), [
    (["label", "I1", "I10", *(f"x{i}" for i in range(37))], r"column 3 is called 'I10', but at this place I2 is"),
    (NAMES[1:], r"expected 40 columns .*, got 39: I1, I2"),
    (["label", *NAMES[:39]], r"column 2 is called 'label', but at this place I1"),
    ([*NAMES, "LABEL"], r"expected each column once, found more than one called label"),
])  # fmt: skip
def test_names_that_contradict(tmp_path, names, words):
    arrays = (table_of(LINES) * 2)[: len(names)]
    with pytest.raises(DataError, match=words):
        parsed(named(tmp_path, names, arrays))
