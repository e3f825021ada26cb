"""JSON files tampered with in every way that a careless editor, another program or an attacker may choose."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = {
    "null": None, "true": True, "a string": "x", "empty string": "", "negative": -1, "zero": 0, "huge": 10**30,
    "2^31": 2**31, "fraction": 0.5, "NaN": float("nan"), "infinity": float("inf"), "empty list": [], "empty object": {},
    "a list": [1, "x", None], "an object": {"x": 1}, "up and out": "../../x", "surrogate": "\ud800", "control": "\0\n",
}  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where in a JSON value something can be replaced: every key, and the first item of every list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def _put(value: Any, path: tuple, new: Any) -> Any:
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


def _without(value: Any, path: tuple) -> Any:
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return whole


def texts(good: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, the bytes): faults of the text itself."""
    yield "empty", b""
    yield "a newline", b"\n"
    yield "null", b"null"
    yield "a number", b"5"
    yield "a list", b"[]"
    yield "empty object", b"{}"
    for share in (0.1, 0.5, 0.9):
        yield f"cut at {share:.0%}", good[: int(len(good) * share)]
    yield "binary", bytes(range(256)) * 8
    yield "BOM", b"\xef\xbb\xbf" + good
    yield "UTF-16", good.decode().encode("utf-16")
    yield "an object twice", good + good
    yield "a key twice", good.rstrip().removesuffix(b"}") + b', "version": 2}'
    yield "deep lists", b"[" * 200_000
    yield "deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "a million digits", good.replace(b": ", b": " + b"9" * 10**6, 1)


def values(good: Any, path: tuple) -> Iterator[tuple[str, Any]]:
    """(what was done, the value): one place gone, or replaced by everything that it can hardly be."""
    name = ".".join(map(str, path))
    yield f"{name} missing", _without(good, path)
    for kind, new in VALUES.items():
        yield f"{name}: {kind}", _put(good, path, new)
    yield f"{name}.unknown", _put(good, (*path[:-1], "unknown"), 1) if isinstance(path[-1], str) else good


def variants(good: bytes) -> Iterator[tuple[str, bytes]]:
    """All of them: (what was done, the bytes of the file)."""
    yield from texts(good)
    value = json.loads(good)
    for path in places(value):
        for name, changed in values(value, path):
            yield name, json.dumps(changed).encode()


def one(good: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One of them by chance, or two at once."""
    value = json.loads(good)
    if chance.random() < 0.2:
        return chance.choice(list(texts(good)))
    name, changed = chance.choice(list(values(value, chance.choice(list(places(value))))))
    if chance.random() < 0.3 and isinstance(changed, dict) and (left := list(places(changed))):
        more, changed = chance.choice(list(values(changed, chance.choice(left))))
        name = f"{name}, {more}"
    return name, json.dumps(changed).encode()
