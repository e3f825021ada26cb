"""Which column of a file with named columns is which of the 40: by name where the names say it, else by place."""

import sys
from collections.abc import Sequence
from functools import cache

from gpu_etl.common.errors import DataError
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, DENSE, SPARSE

# Names that the field gives the 40 columns: ours, torchrec's and NVTabular's, and those of tables without names in
# Spark and pandas, whose order is lost where somebody sorts them: _c0, _c1, _c10.
SCHEMES = (
    COLUMN_NAMES,
    ("label", *(f"int_{i}" for i in range(DENSE)), *(f"cat_{i}" for i in range(SPARSE))),
    tuple(f"_c{i}" for i in range(COLUMNS)),
    tuple(str(i) for i in range(COLUMNS)),
)
SHOWN = 80


def resolve(names: Sequence[str], file: str, label_optional: bool = False) -> list[str]:
    """The names of the file's columns that are the label, I1 to I13 and C1 to C26, in this order; "" in place of a
    label that is not there, if it is optional.

    Names that are those of a scheme, in upper or lower case, say which column is which, and other columns beside them
    are left out; else the place says it, and both is said on stderr, once for all files alike. Raises DataError where
    there are too many or too few columns, where a name is there twice, and where some names contradict their places.
    """
    names = list(names)
    found = _by_name(names, file, label_optional)
    if found:
        extra = [name for name in names if name not in found]
        if extra:
            _say(f"columns left out, as their names are none of {COLUMN_NAMES[0]}, I1 ... C26: {_shown(extra)}")
        return found
    if label_optional and len(names) == COLUMNS - 1:
        _check_places(names, COLUMN_NAMES[1:], file)
        _say(f"columns told by their place, without a label, as their names say nothing: {_shown(names)}")
        return ["", *names]
    if len(names) != COLUMNS:
        raise DataError(
            f"{file}: expected {COLUMNS} columns (label, 13 integers, 26 categories, in this order, or with the names "
            f"label, I1 to I13, C1 to C26 in any order), got {len(names)}: {_shown(names)}; select and order them, or "
            "name them, when writing the file"
        )
    _check_places(names, COLUMN_NAMES, file)
    _say(f"columns told by their place, as their names say nothing: {_shown(names)}")
    return names


def _by_name(names: list[str], file: str, label_optional: bool) -> list[str] | None:
    """What resolve() returns, where the names are those of a scheme."""
    lower = [name.lower() for name in names]
    for scheme in SCHEMES:
        wanted = [name.lower() for name in scheme]
        there = [name for name in wanted if name in lower]
        no_label = label_optional and there == wanted[1:] and scheme[0] == COLUMN_NAMES[0]
        if there != wanted and not no_label:
            continue
        twice = [name for name in there if lower.count(name) > 1]
        if twice:
            raise DataError(f"{file}: expected each column once, found more than one called {_shown(twice)}")
        return [names[lower.index(name)] if name in lower else "" for name in wanted]
    return None


def _check_places(names: list[str], expected: Sequence[str], file: str) -> None:
    """Raise DataError where some columns have names of ours, but not at the places of these names."""
    for place, (name, here) in enumerate(zip(names, expected, strict=True)):
        if name.lower() in map(str.lower, COLUMN_NAMES) and name.lower() != here.lower():
            raise DataError(
                f"{file}: column {place + 1} is called {name!r}, but at this place {here} is expected, and not all "
                "columns have names by which they could be told; name all of them label, I1 to I13, C1 to C26"
            )


def _shown(names: list[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


@cache
def _say(words: str) -> None:
    print(words, file=sys.stderr)
