"""Numbers on the command line: a wrong one is one clear line, whatever it is; a right one runs."""

import argparse
import json

import pytest

from gpu_etl import flags
from gpu_etl.__main__ import main
from gpu_etl.errors import DataError
from gpu_etl.settings import Settings

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e20", "100000000000000000000", "9" * 5000, "x", "", "1,2", "0x10", "½")
SEVERAL_PROCESSES = {"workers", "worker_timeout"}  # tests of the cluster hold them


def numeric_flags():
    """(command, flag) of all flags whose values are converted from text to a number."""
    (commands,) = (a for a in flags.build_parser("")._actions if isinstance(a, argparse._SubParsersAction))
    for command, parser in commands.choices.items():
        for action in parser._actions:
            is_number = action.type not in (None, str) and getattr(action.type, "__name__", "") != "Path"
            if action.option_strings and is_number and action.dest not in SEVERAL_PROCESSES:
                yield command, action.option_strings[-1]


FLAGS = list(numeric_flags())


def test_all_numeric_flags_are_found():
    assert len(FLAGS) >= 20 and {command for command, _ in FLAGS} == {"encode", "synth", "doctor"}


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=lambda word: word.strip("-"))
def test_every_number_runs_or_is_one_clear_line(day_files, tmp_path, capsys, command, flag):
    wrong = 0
    for turn, value in enumerate(VALUES):
        out = str(tmp_path / str(turn))
        words = {
            "encode": ["encode", *map(str, day_files[: 1 if flag == "--days" else None]), "--out", out],
            "synth": ["synth", "--out", out, *(["--rows", "100"] if flag != "--rows" else [])],
            "doctor": ["doctor", "--only", "machine"] if value in VALUES[:4] else ["doctor", "--list"],
        }[command]
        try:
            status = main([*words, f"{flag}={value}"])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        if status == 0:
            json.loads(said.out.splitlines()[-1])
            continue
        wrong += 1
        assert status in (1, 2) and not said.out
        (line,) = (line for line in said.err.splitlines() if "error: " in line)
        assert "expected" in line and "Traceback" not in said.err and len(line) < 400, line
        assert flag in line or value == "0", line  # a share of 0 leaves no rows, of which the error tells
    assert wrong >= 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fractions": (float("nan"), 0.5, 0.5)}, "--fractions"),
        ({"seed": 2**64}, "--seed: expected"),
        ({"slab_bytes": 2**41}, "--slab-bytes: expected"),
        ({"threads": 10**9}, "--threads"),
        ({"days": 10**9}, "cut into 2 to 10000 days"),
    ],
)
def test_settings_made_in_python_are_looked_at_too(change, words):
    with pytest.raises(DataError, match=words):
        Settings(**change).check(1)
