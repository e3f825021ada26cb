"""Slow, obvious Python that the encoder is held against, in tests and by `doctor`. Shares no code with the project."""

import random
from collections import Counter

COLUMNS = 40
FIELDS, LABEL, INTEGER, RANGE, HEX = "fields", "label", "integer", "range", "hex"
DECIMAL, HEXADECIMAL = set(b"0123456789"), set(b"0123456789abcdefABCDEF")


def parse_row(line: bytes):
    """One row without newline -> ([40 values or None where empty], None), or (None, (fault, column))."""
    fields = line.removesuffix(b"\r").split(b"\t")
    if len(fields) != COLUMNS:
        return None, (FIELDS, 0)
    values = []
    for column, field in enumerate(fields):
        fault, value = None, None
        if column == 0:
            fault = None if field in (b"0", b"1") else LABEL
            value = None if fault else int(field)
        elif field and column < 14:
            digits = field.removeprefix(b"-")
            if not digits or not set(digits) <= DECIMAL:
                fault = INTEGER
            elif not -(2**31) <= int(field) < 2**31:
                fault = RANGE
            else:
                value = int(field)
        elif field:
            if not set(field) <= HEXADECIMAL:
                fault = HEX
            elif len(field) > 8:
                fault = RANGE
            else:
                value = int(field, 16)
        if fault:
            return None, (fault, column)
        values.append(value)
    return values, None


def read_rows(text: bytes):
    """All rows of a text, parsed; the last newline is optional."""
    return [parse_row(line)[0] for line in text.removesuffix(b"\n").split(b"\n")]


FIRST_IDS = {"mlperf": 0, "count": 1, "torchrec": 2, "dle": 1}
RARE_IDS = {"mlperf": 0, "count": 0, "torchrec": 1, "dle": 0}


def vocabularies(rows, preset: str, min_count: int = 0, max_index_range: int = 0, max_table_size: int = 0):
    """{key: id} of each of the 26 columns, over all rows."""
    found = []
    for column in range(14, COLUMNS):
        keys = [row[column] for row in rows]
        if preset in ("mlperf", "torchrec"):
            keys = [key or 0 for key in keys]
        keys = [key % max_index_range if max_index_range else key for key in keys if key is not None]
        counts = Counter(keys)  # in order of first appearance
        kept = [key for key in counts if counts[key] >= min_count]
        if preset in ("count", "dle"):
            kept.sort(key=lambda key: (-counts[key], key))
        ids = {key: i + FIRST_IDS[preset] for i, key in enumerate(kept)}
        found.append({key: i for key, i in ids.items() if not max_table_size or i < max_table_size})
    return found


def dense_values(row, preset: str, smallest: int):
    """The 13 integers of a record."""
    if preset == "torchrec":
        return [min((value or 0) - smallest + 1, 2**31 - 1) for value in row[1:14]]
    if preset == "dle":
        return [0 if value is None else min(max(value + 2, 0), 2**31 - 1) for value in row[1:14]]
    return [max(value or 0, 0) for value in row[1:14]]


def encode_days(days, preset: str, **rules):
    """Records, lists of 40, of each day's rows; rules as for vocabularies."""
    words = vocabularies([row for rows in days for row in rows], preset, **rules)
    index_range = rules.get("max_index_range", 0)
    encoded = []
    for rows in days:
        smallest = min(value or 0 for row in rows for value in row[1:14])
        records = []
        for row in rows:
            record = [row[0], *dense_values(row, preset, smallest)]
            for column, ids in zip(range(14, COLUMNS), words, strict=True):
                key = row[column]
                if key is None and preset in ("mlperf", "torchrec"):
                    key = 0
                if key is not None and index_range:
                    key %= index_range
                record.append(ids.get(key, RARE_IDS[preset]))
            records.append(record)
        encoded.append(records)
    return encoded


def write_rows(seed: int, rows: int) -> bytes:
    """Random rows of few distinct values: gaps, negatives, extremes, 0xffffffff, values below eight digits."""
    rand = random.Random(seed)
    lines = []
    for _ in range(rows):
        fields = [rand.choice("01")]
        for _ in range(13):
            fields.append(rand.choice(["", "0", "-1", "-2", "7", "123", str(2**31 - 1), str(-(2**31)), "65536"]))
        for column in range(26):
            popular = int(10 ** (rand.random() * (1 + column / 10)))
            fields.append(rand.choice(["", "ffffffff", "00000000", "80000000", f"{popular * 2654435761 % 2**32:08x}",
                                       f"{popular:x}"]))  # fmt: skip
        lines.append("\t".join(fields))
    return ("\n".join(lines) + "\n").encode()
