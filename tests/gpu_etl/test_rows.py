"""Rows parsed by the compiled loops, held against tests/reference.py."""

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.rows import faults, scalar as rows
from tests import reference

KINDS = {
    reference.FIELDS: rows.FAULT_FIELDS,
    reference.LABEL: rows.FAULT_LABEL,
    reference.INTEGER: rows.FAULT_INTEGER,
    reference.RANGE: rows.FAULT_RANGE,
    reference.HEX: rows.FAULT_HEX,
}
GOOD = b"1" + b"\t5" * 13 + b"\tabcdef01" * 26


def parse_text(text: bytes):
    array = np.frombuffer(text, np.uint8)
    return cpu.parse(array, cpu.find_rows(array))


def check(lines: list[bytes]):
    """Same values or the same fault for every line."""
    values, missing, codes = parse_text(b"\n".join(lines) + b"\n")
    assert len(codes) == len(lines)
    for row, line in enumerate(lines):
        expected, fault = reference.parse_row(line)
        if fault:
            kind, column = fault
            assert codes[row] == KINDS[kind] * rows.FAULT_STRIDE + column, line
            continue
        assert codes[row] == 0, line
        assert [int(missing[row]) >> c & 1 for c in range(40)] == [value is None for value in expected]
        assert values[row].tolist() == [(value or 0) % 2**32 for value in expected]


field = st.one_of(
    st.sampled_from([b"", b"0", b"1", b"-1", b"-", b"+1", b"--1", b"2147483647", b"2147483648", b"-2147483648",
                     b"-2147483649", b"99999999999999999999", b"-0", b"007", b"ffffffff", b"FFFFffff", b"123456789",
                     b"g0000000", b"0000000g", b"12345678", b" 1", b"1.5", b"\xff", b"0x12", b"@", b"`", b"/", b":",
                     b"\r"]),
    st.binary(max_size=10).filter(lambda b: not set(b) & set(b"\t\n")),
    st.integers(-(2**33), 2**33).map(lambda n: str(n).encode()),
    st.integers(0, 2**34).map(lambda n: f"{n:x}".encode()),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzzed_rows_give_the_reference_values_or_its_fault(data):
    lines = []
    for _ in range(data.draw(st.integers(1, 4))):
        fields = GOOD.split(b"\t")
        for _ in range(data.draw(st.integers(0, 3))):
            fields[data.draw(st.integers(0, 39))] = data.draw(field)
        change = data.draw(st.sampled_from([0, 0, 0, 0, 1, -1, -39]))
        fields = fields[:change] if change < 0 else fields + [b"5"] * change
        lines.append(b"\t".join(fields))
    check(lines)


def test_random_rows_agree():
    check(reference.write_rows(seed=5, rows=300).removesuffix(b"\n").split(b"\n"))


def test_empty_row_all_missing_row_and_carriage_return():
    check([b"", b"\t" * 39, b"0" + b"\t" * 39, GOOD + b"\r", b"1" + b"\t" * 39 + b"\r"])


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"a", b"a\n", b"\na", b"a\n\nb", b"x" * 200 + b"\n" + b"y" * 63, b"\n" * 130]
)
def test_rows_end_where_python_splits(text):
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    ends = cpu.find_rows(np.frombuffer(text, np.uint8))
    assert np.diff(np.concatenate([[-1], ends])).tolist() == [len(line) + 1 for line in lines]


@pytest.mark.parametrize(
    ("column", "bad", "words"),
    [
        (0, b"2", "column label: expected the label 0 or 1, got '2'"),
        (3, b"1e5", "column I3: expected a decimal integer or nothing, got '1e5'"),
        (13, b"2147483648", "column I13: expected at most 32 bits"),
        (14, b"xyz", "column C1: expected up to 8 hex digits or nothing, got 'xyz'"),
        (39, b"a\tb", "expected 40 tab-separated fields, got 41"),
    ],
)
def test_faults_are_described(column, bad, words):
    fields = GOOD.split(b"\t")
    fields[column] = bad
    line = b"\t".join(fields)
    code = parse_text(line)[2][0]
    assert words in faults.describe(np.frombuffer(line, np.uint8), 0, len(line), code)


def test_every_byte_at_every_place_of_eight_hex_digits():
    lines = []
    for place in range(8):
        for byte in set(range(256)) - {9, 10}:
            digits = bytearray(b"0f9aAF5e")
            digits[place] = byte
            lines.append(GOOD.replace(b"abcdef01", bytes(digits), 1))
    check(lines)
