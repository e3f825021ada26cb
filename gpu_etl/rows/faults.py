"""Words for a row that cannot be parsed."""

from collections.abc import Sequence

import numpy as np

from gpu_etl.rows import scalar as rows
from gpu_etl.schema import COLUMN_NAMES, COLUMNS

EXPECTED = {
    rows.FAULT_LABEL: "expected the label 0 or 1",
    rows.FAULT_INTEGER: "expected a decimal integer or nothing",
    rows.FAULT_RANGE: "expected at most 32 bits: an integer from -2147483648 to 2147483647, or up to 8 hex digits",
    rows.FAULT_HEX: "expected up to 8 hex digits or nothing",
}
REASONS = {
    rows.FAULT_FIELDS: "wrong number of fields",
    rows.FAULT_LABEL: "bad label",
    rows.FAULT_INTEGER: "bad integer",
    rows.FAULT_RANGE: "out of range",
    rows.FAULT_HEX: "bad hex digits",
}
SHOWN = 80
CUT = 4 * (SHOWN + 1)  # bytes that hold more characters than are shown
BLOCK_BYTES = 1 << 16


def places(text: np.ndarray, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Where some rows of text, uint8 [bytes], begin and end; their numbers in ascending order. One pass over the text,
    whatever their number, and no further than the last of them."""
    newlines = sorted({number for row in wanted for number in (row - 1, row)} - {-1})
    found, done, next_ = {-1: -1}, 0, 0
    for start in range(0, len(text), BLOCK_BYTES):
        here = np.flatnonzero(text[start : start + BLOCK_BYTES] == rows.NEWLINE)
        while next_ < len(newlines) and newlines[next_] < done + len(here):
            found[newlines[next_]] = start + int(here[newlines[next_] - done])
            next_ += 1
        if next_ == len(newlines):
            break
        done += len(here)
    return [(found[row - 1] + 1, found.get(row, len(text))) for row in wanted]


def describe(text: np.ndarray, begin: int, end: int, code: int, labelled: bool = True) -> str:
    """What is wrong with the row text[begin:end] (uint8), given its fault code of rows.parse_row (not 0).

    labelled: False where the row's label and the tab behind it were put before it here, and are no part of the words.
    """
    kind, column = divmod(int(code), rows.FAULT_STRIDE)
    if not labelled:
        begin, column = begin + 2, column - 1
    row = text[begin:end]
    if kind == rows.FAULT_FIELDS:
        count = int(np.count_nonzero(row == rows.TAB)) + 1
        shown = _show(bytes(row[:CUT]).rstrip(b"\r").replace(b"\t", b" "))
        return f"expected {COLUMNS if labelled else COLUMNS - 1} tab-separated fields, got {count}: {shown}"
    field = bytes(row).rstrip(b"\r").split(b"\t")[column]
    return f"column {(COLUMN_NAMES if labelled else COLUMN_NAMES[1:])[column]}: {EXPECTED[kind]}, got {_show(field)}"


def _show(field: bytes) -> str:
    shown = field[:CUT].decode("utf-8", "replace")
    return repr(shown[:SHOWN]) + ("..." if len(shown) > SHOWN else "")
