"""Every flag that takes a number, given what no number should be: one line of words and a status, or a right run."""

from pathlib import Path

import pytest

import dist_train
import train
from gpu_etl.pipeline import Settings, encode_days
from model import flags, plan_command

VALUES = ["nan", "inf", "-inf", "-1", "-0.5", "0", "1e20", "1e300", "1e400", str(10**20), "x", "", "1,5", "0x10",
          "1_000", "٣"]  # fmt: skip
MODEL = ["--model_config", "criteo_kaggle_tiny", "--batch_size", "256", "--threads", "1", "--warmup_steps", "2"]


def takes_numbers(action) -> bool:
    return action.type not in (None, str, Path) and not action.choices


def numeric(parser) -> dict:
    return {action.option_strings[0]: action for action in parser._actions if takes_numbers(action)}


TRAIN, MANY = numeric(flags.build_parser("")), numeric(dist_train.build_parser())


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def test_the_list_is_whole():
    """Any number of flags may come; none takes whatever int() and float() do."""
    assert len(TRAIN) > 25 and set(TRAIN) < set(MANY)
    for name, action in MANY.items():
        assert action.type not in (int, float), f"{name}: say which numbers are allowed (model.numbers)"


def ended(main, words, capsys):
    """Exit status and what was said, where the flags cannot be as well."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr()


@pytest.mark.parametrize("name", MANY)
def test_numbers_that_cannot_be(folder, tmp_path, capsys, name):
    script, more = (train, []) if name in TRAIN else (dist_train, ["--device", "cpu"])
    count = MANY[name].nargs if isinstance(MANY[name].nargs, int) else 1
    refused = 0
    for value in VALUES:
        words = ["--dataset", str(folder), "--output_dir", str(tmp_path), *MODEL, *more, name, *[value] * count]
        status, said = ended(script.main, words, capsys)
        case = f"{name} {value!r}: {status}, {said.err}"
        assert status in (0, 1, 2) and "Traceback" not in said.err, case
        if status == 2:
            assert said.err.count("\n") == 1 and f"error: argument {name}" in said.err and not said.out, case
            refused += 1
        if status == 1:
            assert said.err.count("error: ") == 1 and said.err.splitlines()[-1].startswith("error: "), case
        if status == 0:
            assert said.out.splitlines()[-1].startswith('{"command"'), case
    assert refused >= 10  # no flag takes nan, inf, words, or numbers as no other program writes them


PLAN = ["--world", "--batch_size", "--memory", "--link", "--network", "--per_node"]


@pytest.mark.parametrize("name", PLAN)
def test_numbers_of_the_plan(capsys, name):
    for value in VALUES:
        words = ["--model_config", "criteo_kaggle_tiny", "--world", "2", name, value]
        status, said = ended(plan_command.main, words, capsys)
        assert status in (0, 1, 2) and "Traceback" not in said.err, (value, said.err)
        if value in ("nan", "inf", "x", "-1"):
            assert status == 2, value
