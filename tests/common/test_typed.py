"""The reader of JSON and YAML from outside converts nothing, and says what is wrong with each key."""

import json
import os
from dataclasses import dataclass

import pytest

from common import typed


class WrongError(Exception):
    pass


@dataclass(frozen=True)
class File:
    __pydantic_config__ = typed.STRICT
    bytes: int
    crc32: str = ""


@dataclass(frozen=True)
class Thing:
    __pydantic_config__ = typed.STRICT
    count: int
    sizes: tuple[int, ...] = ()
    share: float = 1.0
    flag: bool = False
    files: dict[str, File] | None = None
    more: tuple[File, ...] = ()

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: expected 0 or more, got {self.count}")


def test_what_fits_is_read_with_its_defaults():
    text = b'{"count": 3, "sizes": [1, 2], "share": 2, "files": {"a": {"bytes": 1}}}'
    assert typed.read_json(Thing, text, "f", WrongError) == Thing(3, (1, 2), 2.0, False, {"a": File(1)})
    assert typed.read(Thing, {"count": 3, "sizes": [1]}, "f", WrongError) == Thing(3, (1,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"count": "13"}', "f: count: expected a valid integer, got '13'"),
        ('{"count": 13.0}', "f: count: expected a valid integer, got 13.0"),
        ('{"count": 1e30}', "f: count: expected a valid integer"),
        ('{"count": true}', "f: count: expected a valid integer, got True"),
        ('{"count": 1, "sizes": [1, true]}', "f: sizes.1: expected a valid integer, got True"),
        ('{"count": 1, "sizes": 5}', "f: sizes: expected a valid array, got 5"),
        ('{"count": 1, "flag": "false"}', "f: flag: expected a valid boolean, got 'false'"),
        ('{"count": 1, "flag": 0}', "f: flag: expected a valid boolean, got 0"),
        ('{"count": 1, "share": NaN}', "f: damaged, or not JSON: NaN is no number of JSON"),
        ('{"count": 1, "share": 1e999}', "f: damaged, or not JSON: 1e999 is too large a number"),
        ('{"count": -1}', "f: count: expected 0 or more, got -1"),
        ('{"count": 1, "count": 2}', "f: damaged, or not JSON: the key 'count' is there twice"),
        ('{"cuont": 1}', "f: cuont: no such key; did you mean count?"),
        ('{"count": 1, "zzz": 1}', "f: zzz: no such key; expected count, sizes, share, flag, files, more"),
        ('{"count": 1, "files": {"a": {"byte": 1}}}', "f: files.a.byte: no such key; did you mean bytes?"),
        ('{"count": 1, "more": [{"bytes": 1, "crc": ""}]}', "f: more.0.crc: no such key; did you mean crc32?"),
        ('{"flag": true}', "f: count: missing"),
        ("[1]", "f: expected an object of keys and values, got [1]"),
        ("{", "f: damaged, or not JSON"),
        ("[" * 100_000, "f: damaged, or not JSON"),
        (b'{"count": 1}\xff', "f: damaged, or not JSON"),
        (json.dumps({str(key): 0 for key in range(10_001)}), "f: damaged, or not JSON: an object of 10,001 keys"),
    ],
)
def test_what_does_not_is_told(text, words):
    with pytest.raises(WrongError) as raised:
        typed.read_json(Thing, text, "f", WrongError)
    assert words in str(raised.value)


def test_each_wrong_key_has_its_line_up_to_a_limit():
    with pytest.raises(WrongError) as raised:
        typed.read(Thing, {"count": "1", "flag": 2, "shar": 1.0, "sizes": list("x" * 99)}, "f", WrongError)
    lines = str(raised.value).splitlines()
    assert len(lines) == 21 and all(line.startswith("f: ") for line in lines) and lines[-1] == "f: and 82 more"


def test_long_values_are_cut():
    with pytest.raises(WrongError) as raised:
        typed.read(Thing, {"count": "1" * 10_000}, "f", WrongError)
    assert len(str(raised.value)) < 200


def test_only_small_files_that_end_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert typed.read_file(path, WrongError, 5) == b"12345"
    with pytest.raises(WrongError, match="file: expected at most 4 bytes, got 5"):
        typed.read_file(path, WrongError, 4)
    os.mkfifo(tmp_path / "pipe")
    for there in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(WrongError, match=f"{there}: expected a file, got a pipe or a device"):
            typed.read_file(there, WrongError)
    for there in (tmp_path, tmp_path / "none", path / "in a file"):
        with pytest.raises(OSError) as raised:
            typed.read_file(there, WrongError)
        assert raised.value.filename == str(there) or raised.value.filename == there
