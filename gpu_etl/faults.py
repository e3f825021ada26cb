"""Words for a row that cannot be parsed."""

import numpy as np

from gpu_etl import rows
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


def describe(text: np.ndarray, begin: int, end: int, code: int) -> str:
    """What is wrong with the row text[begin:end] (uint8), given its fault code of rows.parse_row (not 0)."""
    fields = bytes(text[begin:end]).rstrip(b"\r").split(b"\t")
    kind, column = divmod(int(code), rows.FAULT_STRIDE)
    if kind == rows.FAULT_FIELDS:
        return f"expected {COLUMNS} tab-separated fields, got {len(fields)}: {_show(b' '.join(fields))}"
    return f"column {COLUMN_NAMES[column]}: {EXPECTED[kind]}, got {_show(fields[column])}"


def _show(field: bytes) -> str:
    shown = field.decode("utf-8", "replace")
    return repr(shown[:SHOWN]) + ("..." if len(shown) > SHOWN else "")
