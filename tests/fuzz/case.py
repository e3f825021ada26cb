"""What a fuzz case is, and what all of them begin with."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import train
from gpu_etl.__main__ import main as gpu_etl
from model.plan_command import main as sharding
from tests.reference import write_rows

FLAGS = ["--threads", "1", "--batch_size", "1024", "--lr", "0.1", "--warmup_steps", "2", "--epochs", "1", "--device",
         "cpu"]  # fmt: skip
TINY = ["--model_config", "criteo_kaggle_tiny"]
DAYS = 3
PIECES = b"9" * 30, b"-", b"NaN", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\t\t"
BYTES = b"\0\x01\t\n\r -+.0189afAFgxX\x7f\x80\xff"


class WrongError(Exception):
    """A case that ended as it must not."""


def template(folder: Path) -> None:
    """What cases begin with: days/, set/ (records), dle/ (split files), runs/ (a checkpoint), model.json,
    small.json, plan.json."""
    (folder / "days").mkdir(parents=True)
    days = [str(folder / "days" / f"day_{day}") for day in range(DAYS)]
    for day, path in enumerate(days):
        Path(path).write_bytes(write_rows(seed=day, rows=40))
    for name, more in (("set", []), ("dle", ["--format", "dle"])):
        assert gpu_etl(["encode", *days, "--out", str(folder / name), "--min-count", "2", *more]) == 0
    words = ["--dataset", str(folder / "set"), *TINY, *FLAGS, "--output_dir", str(folder / "runs"), "--save_freq", "1"]
    assert train.main(words) == 0
    config = json.loads((Path(train.__file__).parent / "model" / "configs" / "criteo_kaggle_tiny.json").read_text())
    (folder / "small.json").write_text(json.dumps(config | {"categorical_feature_sizes": [300] * 26}))
    shutil.copy(Path(train.__file__).parent / "model" / "configs" / "criteo_kaggle_tiny.json", folder / "model.json")
    words = ["--model_config", "criteo_kaggle_tiny", "--world", "2", "--gpu", "cpu", "--batch_size", "128"]
    assert sharding([*words, "--save_plan", str(folder / "plan.json")]) == 0


class Case:
    """One input made of a seed, in a folder that is a copy of template(); run(main, words) runs a command there."""

    def __init__(self, folder: Path, chance: random.Random, run: Callable[[Callable, list[str]], tuple[int, str]]):
        self.folder, self.chance, self._run = folder, chance, run
        self.days = [str(folder / "days" / f"day_{day}") for day in range(DAYS)]

    def run(self, main: Callable, *words) -> tuple[int, str]:
        """Status and stderr of a command. Raises WrongError where it ends in none of the ways that commands may end."""
        return self._run(main, [str(word) for word in words])

    def gpu_etl(self, *words) -> tuple[int, str]:
        """python -m gpu_etl."""
        return self.run(gpu_etl, *words)

    def train(self, *words) -> tuple[int, str]:
        """python train.py, on a model of a few rows where no other is named."""
        words = [*words, "--output_dir", self.folder / "new", *FLAGS]
        return self.run(train.main, *(words if "--model_config" in words else [*words, *TINY]))

    def mutate(self, data: bytes, most: int = 8) -> bytes:
        """The bytes with some of them changed, cut, copied, or put in."""
        found, chance = bytearray(data), self.chance
        for _ in range(chance.randint(1, most)):
            place = chance.randrange(len(found) + 1)
            kind = chance.randrange(7)
            if kind == 0 and found:
                found[place % len(found)] ^= 1 << chance.randrange(8)
            elif kind == 1 and found:
                found[place % len(found)] = chance.choice(BYTES)
            elif kind == 2:
                del found[place : place + chance.choice([1, 2, 50, len(found)])]
            elif kind == 3:
                found[place:place] = bytes(chance.choices(BYTES, k=chance.choice([1, 1, 3, 60])))
            elif kind == 4:
                begin = chance.randrange(len(found) + 1)
                found[place:place] = found[begin : begin + chance.randrange(100)]
            elif kind == 5 and len(found) > 8:
                place = place % (len(found) - 8)
                number = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
                found[place : place + 8] = number.to_bytes(8, "little")
            elif kind == 6:
                found[place:place] = chance.choice(PIECES)
        return bytes(found)
