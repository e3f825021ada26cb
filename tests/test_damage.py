"""Checkpoints damaged at random, and gone on from: every end has the right bits, or is a clear error.

DAMAGES=200 python -m pytest tests/test_damage.py    for the long run
"""

import os
import random
import shutil

import pytest

import train
from gpu_etl.pipeline import Settings, encode_days
from tests.ranks import run_main
from tests.test_kill_training import FLAGS, digests

DAMAGES = int(os.environ.get("DAMAGES", "16"))
SAVED = 26  # steps, one epoch; the run goes on to the end of the second


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def words(folder, out, *more):
    return ["--dataset", str(folder), "--output_dir", str(out), *FLAGS, *more]


@pytest.fixture(scope="module", params=[1, 2], ids=["train", "two ranks"])
def runs(request, folder, tmp_path_factory):
    """(a run stopped after an epoch, another like it of another seed, the end it must come to)."""
    found = []
    for seed in ("0", "1"):
        out = tmp_path_factory.mktemp(f"run_{seed}_")
        of = words(folder, out, "--seed", seed, "--epochs", "1")
        if request.param == 1:
            assert train.main(of) == 0
        else:
            said = tmp_path_factory.mktemp("said")
            assert [end.status for end in run_main(2, of, said)] == [0, 0]
        found.append(out)
    end = tmp_path_factory.mktemp("end") / "out"
    shutil.copytree(found[0], end)
    assert train.main(words(folder, end, "--ckpt", str(end))) == 0
    return (*found, digests(end / "step_52"))


def flip(path, chance):
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])


def append(path, chance):
    with open(path, "ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 300)))


def delete(path, chance):
    path.unlink()


def swap(path, other):
    shutil.copy(other, path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(DAMAGES))
def test_the_right_bits_or_a_clear_error(folder, runs, tmp_path, number, capsys):
    run, other, right = runs
    chance, out = random.Random(number), tmp_path / "out"
    shutil.copytree(run, out)
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    path = chance.choice([path for path in paths if str(SAVED) in path.parent.name] if number % 4 else paths)
    kind = chance.choice([flip, cut, append, delete, swap])
    if kind is swap:
        swap(path, other / path.relative_to(out))
    else:
        kind(path, chance)
    capsys.readouterr()
    status = train.main(words(folder, out, "--ckpt", str(out)))
    said = capsys.readouterr().err
    what = f"{kind.__name__} {path.relative_to(out)}: {said}"
    if status:
        assert status == 1 and said.count("error: ") == 1 and "Traceback" not in said, what
    else:
        assert digests(out / "step_52") == right, what
