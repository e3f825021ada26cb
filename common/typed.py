"""The one reader of what comes from outside as JSON or YAML: into a frozen dataclass, or not at all.

A class to be read is a frozen dataclass that says `__pydantic_config__ = STRICT`. Nothing is converted: "13", 13.0 and
true are no integers; a list becomes a tuple where a tuple is wanted; keys that are not fields are errors.
"""

import difflib
import errno
import json
import os
import stat
from dataclasses import fields, is_dataclass
from functools import cache
from math import isinf
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
SHOWN = 80  # characters of a value
MOST_FAULTS = 20  # that are told
MOST_KEYS = 10_000  # of an object
MOST_BYTES = 32 << 20  # of a file: Python takes up to 40 times as much
T = TypeVar("T")


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:  # each that is wrong would become an error of a kilobyte
        raise ValueError(f"an object of {len(pairs):,} keys; expected at most {MOST_KEYS:,}")
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):  # 1e999
        raise ValueError(f"{text[:SHOWN]} is too large a number")
    return number


def read_file(path: str | Path, error: type[Exception], most: int = MOST_BYTES) -> bytes:
    """All bytes of a small file. Raises `error` where it is none that can be read to an end (a pipe, a device), or has
    more than `most` bytes; OSError, with its name, as open() does."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: expected a file, got a pipe or a device")
    if found.st_size > most:
        raise error(f"{path}: expected at most {most:,} bytes, got {found.st_size:,}; is this the right file?")
    with open(path, "rb") as file:
        return file.read(most)


def parse_json(text: str | bytes, where: str, error: type[Exception]) -> Any:
    """The value that a JSON text holds. Raises `error`, naming `where`, for text that is no JSON, for NaN and Infinity,
    and for a key that is there twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as failed:  # bytes that are no text, and text that is no JSON, are ValueErrors
        raise error(f"{where}: damaged, or not JSON: {failed}") from failed


def read_json(kind: type[T], text: str | bytes, where: str, error: type[Exception], version: int | None = None) -> T:
    """read() of what a JSON text holds."""
    return read(kind, parse_json(text, where, error), where, error, version)


def read(kind: type[T], values: Any, where: str, error: type[Exception], version: int | None = None) -> T:
    """`values`, as a JSON or YAML reader gives them, as `kind`: a frozen dataclass, or a type made of some.

    Raises `error` with a line for each thing that is wrong: where, which key, what was expected, what came; a misspelt
    key is answered with the nearest right one. version: what the key of that name must be, before all else.
    """
    if version is not None and isinstance(values, dict) and values.get("version") != version:
        raise error(f"{where}: expected version {version}, got {values.get('version')}")
    try:
        return _adapter(kind).validate_json(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as failed:
        if not isinstance(failed, ValidationError):  # YAML has dates and the like
            raise error(f"{where}: expected what JSON can hold: {failed}") from failed
        lines = [f"{where}: {_words(fault, kind)}" for fault in failed.errors()[:MOST_FAULTS]]
        more = failed.error_count() - len(lines)
        raise error("\n".join(lines + [f"{where}: and {more:,} more"] * (more > 0))) from failed


def _keys(kind: Any, place: list) -> list[str]:
    """The keys that a value at a place within a `kind` may have; none where it is no dataclass there."""
    if is_dataclass(kind):
        return _keys(get_type_hints(kind).get(place[0]), place[1:]) if place else [f.name for f in fields(kind)]
    inner = [*get_args(kind)] if get_origin(kind) in (Union, UnionType) else [*get_args(kind)][-1:] if place else []
    if get_origin(kind) is tuple:
        inner = [*get_args(kind)][:1]
    step = 0 if get_origin(kind) in (Union, UnionType) else 1
    return next((keys for some in inner if (keys := _keys(some, place[step:]))), [])


def _words(fault: dict, kind: type) -> str:
    *outer, last = fault["loc"] or ("",)
    key, got = ".".join(map(str, fault["loc"])), repr(fault["input"])
    got = got if len(got) <= SHOWN else got[:SHOWN] + "..."
    if fault["type"] == "missing":
        return f"{key}: missing"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys(kind, outer)
        near = difflib.get_close_matches(str(last), known, 1)
        return f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}")
    if fault["type"] == "value_error":  # what the class itself found wrong
        return f"{key}: {fault['ctx']['error']}".removeprefix(": ")
    if fault["type"] == "dataclass_type":
        return f"{key}: expected an object of keys and values, got {got}".removeprefix(": ")
    return f"{key}: {fault['msg'].replace('Input should be', 'expected')}, got {got}".removeprefix(": ")
