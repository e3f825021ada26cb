"""What is fuzzed: for each kind of input, how a case is made of a seed, which commands read it, and how it must end.

Every case ends with status 0 and a last line of JSON, or with one error in words. Text and Parquet are held against
tests/reference.py as well: what is right there must come out right, what is wrong must be refused or left out.
"""

import contextlib
import gzip
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import train
from gpu_etl.__main__ import main as gpu_etl
from gpu_etl.manifest import describe_file
from gpu_etl.schema import COLUMN_NAMES
from model.placement import main as sharding
from model.state import _digest
from tests.gpu_etl import tamper
from tests.reference import encode_days, parse_row, write_rows

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


def _expected(days: list[list], preset: str, min_count: int) -> list[np.ndarray]:
    """Records int32 of train, test and val by the reference, of rows in file order."""
    records = [np.array(day, np.int32).reshape(-1, 40) for day in encode_days(days, preset, min_count=min_count)]
    half = (len(records[-1]) + (preset != "dle")) // 2
    first, second = records[-1][:half], records[-1][half:]
    test, val = (second, first) if preset == "torchrec" else (first, second)
    return [np.concatenate(records[:-1]), test, val]


def _hold(case: Case, out: Path, days: list[list], preset: str, min_count: int) -> None:
    for split, expected in zip(("train", "test", "val"), _expected(days, preset, min_count), strict=True):
        found = np.fromfile(out / f"terabyte_processed_{split}.bin", np.int32).reshape(-1, 40)
        if not np.array_equal(found, expected):
            raise WrongError(f"the {split} split is another than the reference's ({preset}, {len(expected)} rows)")


def _parsed(text: bytes) -> list:
    """Rows of a day as the reference reads them, None where one is bad. Blank lines at the end are none."""
    lines = text.split(b"\n")
    while lines and not lines[-1].removesuffix(b"\r"):
        lines.pop()
    return [parse_row(line)[0] for line in lines]


def text(case: Case) -> None:
    """Raw text, whole and in gzip, held against the reference."""
    chance, days = case.chance, []
    for path in case.days:
        data = write_rows(seed=chance.randrange(10**9), rows=chance.randint(2, 60))
        if chance.random() < 0.3:
            data = data.replace(b"\n", b"\r\n")
        if chance.random() < 0.3:
            data = data.removesuffix(b"\n")
        if chance.random() < 0.5:
            data = case.mutate(data, 3)
        days.append(data)
        Path(path).write_bytes(gzip.compress(data, 1) if chance.random() < 0.2 else data)
    preset, min_count = chance.choice(["mlperf", "count", "torchrec", "dle"]), chance.choice([0, 1, 2, 5])
    min_count *= preset != "mlperf"
    skip = chance.random() < 0.5
    out = case.folder / "out"
    status, said = case.gpu_etl(
        "encode", *case.days, "--out", out, "--preset", preset, "--min-count", min_count, "--no-shuffle",
        "--slab-bytes", chance.choice([1024, 5000, 20_000, 1 << 20]), "--threads", chance.choice([1, 2]),
        "--bad-rows", "skip" if skip else "error",
    )  # fmt: skip
    rows = [_parsed(day) for day in days]
    kept = [[row for row in day if row] for day in rows]
    bad = sum(map(len, rows)) - sum(map(len, kept))
    if status == 0:
        if bad and not skip:
            raise WrongError(f"{bad} bad rows were not noticed")
        _hold(case, out, kept, preset, min_count)
        return
    # What begins like another kind of file may be refused as such, and days may be left with too few rows.
    enough = all(day and day[0] for day in rows) and len(kept[-1]) > 1
    if enough and (not bad or skip):
        raise WrongError(f"{sum(map(len, kept))} rows, {bad} of them bad, were refused: {said[-300:]}")


def _column(chance: random.Random, values: list, c: int) -> pa.Array:
    """A column of a row group, in one of the types that hold such values."""
    if c >= 14 and chance.random() < 0.5:
        found = pa.array([None if value is None else f"{value:08x}" for value in values], pa.string())
        return found.dictionary_encode() if chance.random() < 0.4 else found
    return pa.array(values, chance.choice([pa.int64(), pa.uint32() if c >= 14 or c == 0 else pa.int32()]))


def parquet(case: Case) -> None:
    """Parquet days of several types and encodings, some damaged; whole ones are held against the reference."""
    chance, days, damaged, paths = case.chance, [], False, []
    for day in range(DAYS):
        rows = [parse_row(line)[0] for line in write_rows(chance.randrange(10**9), chance.randint(2, 60)).splitlines()]
        columns = {
            name: _column(chance, [row[c] for row in rows], c) for c, name in enumerate(COLUMN_NAMES)
        }
        path = case.folder / "days" / f"day_{day}.parquet"
        pq.write_table(
            pa.table(columns), path, row_group_size=17, compression=chance.choice(["snappy", "zstd", "none", "gzip"]),
            use_dictionary=chance.random() < 0.5, data_page_version=chance.choice(["1.0", "2.0"]),
        )  # fmt: skip
        if chance.random() < 0.4:
            whole = path.read_bytes()
            path.write_bytes(case.mutate(whole, 3))
            damaged |= path.read_bytes() != whole
        days.append(rows)
        paths.append(path)
    out = case.folder / "out"
    status, said = case.gpu_etl("encode", *paths, "--out", out, "--preset", "mlperf", "--no-shuffle")
    if status == 0 and not damaged:
        _hold(case, out, days, "mlperf", 0)
    elif status and not damaged:
        raise WrongError(f"whole Parquet files were refused: {said[-300:]}")


def squeezed(case: Case) -> None:
    """Damaged gzip files: an error, or what they hold."""
    data = write_rows(case.chance.randrange(10**9), 50)
    path = Path(case.days[1]).with_suffix(".gz")
    path.write_bytes(case.mutate(gzip.compress(data), 2))
    case.gpu_etl("encode", case.days[0], path, case.days[2], "--out", case.folder / "out")


def manifest(case: Case) -> None:
    """Tampered manifests, read by every command that does."""
    path = case.folder / "set" / "manifest.json"
    _, data = tamper.one(path.read_bytes(), case.chance)
    path.write_bytes(data)
    folder = case.folder / "set"
    case.gpu_etl(case.chance.choice(["verify", "inspect"]), folder)
    other = case.chance.randrange(3)
    if other == 0:
        case.gpu_etl("encode", *case.days, "--out", folder, "--min-count", "2")
    elif other == 1:
        case.train("--dataset", folder)
    else:
        case.train("--dataset", folder, "--ckpt", case.folder / "runs", "--mode", "predict", "--input", case.days[0],
                   "--output", case.folder / "s.parquet")  # fmt: skip


def _tell(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    whole["files"][name] = describe_file(folder / name)
    path.write_text(json.dumps(whole))


def vocabulary(case: Case) -> None:
    """Id maps: damaged bytes, arrays of other types and sizes, compressed ones."""
    folder, chance = case.folder / "set", case.chance
    path = folder / "vocabulary.npz"
    if chance.random() < 0.5:
        path.write_bytes(case.mutate(path.read_bytes(), 3))
    else:
        with np.load(path) as arrays:
            found = dict(arrays)
        name = chance.choice(list(found))
        found[name] = chance.choice([
            found[name].astype(chance.choice(["<i8", "<u4", "<f4", "S5", "<M8[s]", "<c16"])), found[name][..., None],
            np.zeros(chance.choice([0, 1, 9, 10**6]), found[name].dtype), np.array(["x"], object), -found[name],
            np.full(found[name].shape, chance.choice([0, 7]), found[name].dtype),
        ])  # fmt: skip
        chance.choice([np.savez, np.savez_compressed])(path, **found)
    if chance.random() < 0.8:
        _tell(folder, path.name)
    if chance.random() < 0.5:
        case.gpu_etl("verify", folder)
    else:
        case.train("--dataset", folder, "--ckpt", case.folder / "runs", "--mode", "predict", "--input", case.days[0],
                   "--output", case.folder / "s.parquet", "--allow_other_data")  # fmt: skip


def feature_spec(case: Case) -> None:
    """feature_spec.yaml beside split files, tampered with: verify notices, loaders do not read it."""
    folder = case.folder / "dle"
    path = folder / "feature_spec.yaml"
    whole = path.read_bytes()
    path.write_bytes(tamper.one(whole, case.chance)[1])
    status, _ = case.gpu_etl("verify", folder)
    if status == 0 and path.read_bytes() != whole:
        raise WrongError("verify takes another feature_spec.yaml than the manifest tells of")
    if case.gpu_etl("inspect", folder)[0]:
        raise WrongError("inspect fails by a file that it does not read")


def split_files(case: Case) -> None:
    """Files of records and of splits with other bytes: verify notices, whatever reads them ends."""
    folder = case.folder / case.chance.choice(["set", "dle"])
    path = case.chance.choice(sorted(path for path in folder.rglob("*.bin")))
    whole = path.read_bytes()
    path.write_bytes(case.mutate(whole, 3))
    if case.chance.random() < 0.3:
        (folder / "manifest.json").unlink()
        case.gpu_etl("inspect", folder)
        case.train("--dataset", folder, "--dataset_type", "auto", "--model_config", case.folder / "small.json")
        return
    status, _ = case.gpu_etl("verify", folder)
    if status == 0 and path.read_bytes() != whole:
        raise WrongError("verify takes another file than the manifest tells of")
    case.train("--dataset", folder, "--dataset_type", "auto")


def npy_days(case: Case) -> None:
    """torchrec's .npy days with damaged headers and bytes."""
    chance, folder = case.chance, case.folder / "npy"
    folder.mkdir()
    for day in range(2):
        rows = [parse_row(line)[0] for line in write_rows(day, 40).splitlines()]
        records = np.array(encode_days([rows], "mlperf")[0])
        np.save(folder / f"day_{day}_labels.npy", records[:, :1].astype(np.int32))
        np.save(folder / f"day_{day}_dense.npy", np.log1p(records[:, 1:14].astype(np.float32)))
        np.save(folder / f"day_{day}_sparse.npy", records[:, 14:].astype(np.int32))
    path = chance.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    begin = case.mutate(data[:128], 3) if chance.random() < 0.7 else data[:128]
    path.write_bytes(begin + (data[128:] if chance.random() < 0.7 else case.mutate(data[128:], 3)))
    case.gpu_etl("inspect", folder)
    case.train("--dataset", folder, "--dataset_type", "auto", "--model_config", case.folder / "small.json")


def config(case: Case) -> None:
    """Model configurations, read by train.py and the planner."""
    path = case.folder / "model.json"
    path.write_bytes(tamper.one(path.read_bytes(), case.chance)[1])
    if case.chance.random() < 0.5:
        case.train("--dataset", case.folder / "set", "--model_config", path)
    else:
        case.run(sharding, "--model_config", path, "--world", "2", "--gpu", "cpu", "--batch_size", "128")


def plan(case: Case) -> None:
    """Plans of the planner."""
    path = case.folder / "plan.json"
    path.write_bytes(tamper.one(path.read_bytes(), case.chance)[1])
    case.run(sharding, *TINY, "--world", "2", "--gpu", "cpu", "--batch_size", "128", "--plan", path)


def state(case: Case) -> None:
    """States of checkpoints, whose digest is made anew in half of the cases."""
    (path,) = (case.folder / "runs").glob("step_*/state.json")
    data = tamper.one(path.read_bytes(), case.chance)[1]
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and case.chance.random() < 0.8:
        values.pop("sha256", None)
        with contextlib.suppress(ValueError):
            data = json.dumps(values | {"sha256": _digest(values)}).encode()
    path.write_bytes(data)
    mode = case.chance.choice([["--mode", "test"], []])
    case.train("--dataset", case.folder / "set", "--ckpt", case.folder / "runs", *mode)


def tensors(case: Case) -> None:
    """Weights of checkpoints with other bytes: refused, as no checksum fits."""
    path = case.chance.choice(sorted((case.folder / "runs").glob("step_*/*.safetensors")))
    whole = path.read_bytes()
    path.write_bytes(case.mutate(whole[:200], 3) + whole[200:] if case.chance.random() < 0.5 else case.mutate(whole, 3))
    status, _ = case.train("--dataset", case.folder / "set", "--ckpt", case.folder / "runs", "--mode", "test")
    if status == 0 and path.read_bytes() != whole:
        raise WrongError("a checkpoint with other bytes was used")


def flag_file(case: Case) -> None:
    """Files of flags, as train.py takes them."""
    words = ["--dataset", str(case.folder / "set"), *TINY, *FLAGS, "--output_dir", str(case.folder / "new")]
    path = case.folder / "flags"
    path.write_bytes(case.mutate("\n".join(words).encode(), 2))
    case.run(train.main, f"@{path}")


def bombs(case: Case) -> None:
    """Small files that open to much: long strings once in a Parquet dictionary, newlines and endless rows in gzip."""
    chance, path = case.chance, Path(case.days[1])
    if chance.random() < 0.5:
        rows = chance.choice([5_000, 20_000])
        places = pa.array(np.zeros(rows, np.int32))
        texts = [b"a" * chance.choice([9, 10**3, 10**5, 10**6]), b"1" * 10**6]
        columns = {name: pa.array(np.zeros(rows, np.int64)) for name in COLUMN_NAMES}
        for name in chance.sample(COLUMN_NAMES[14:], chance.choice([1, 3])):
            columns[name] = pa.DictionaryArray.from_arrays(places, pa.array([chance.choice(texts).decode()]))
        path = path.with_suffix(".parquet")
        pq.write_table(pa.table(columns), path, compression=chance.choice(["zstd", "gzip"]))
    else:
        size = chance.choice([1 << 20, 8 << 20, 32 << 20])
        line = chance.choice([b"\n", b"\t", b"0", b"\t\n", write_rows(1, 1).replace(b"\n", b"")])
        path = path.with_suffix(".gz")
        path.write_bytes(gzip.compress(line * (size // len(line)), 1))
    rules = chance.choice([[], ["--bad-rows", "skip", "--max-bad-rows", 10**9]])
    case.gpu_etl("encode", case.days[0], path, case.days[2], "--out", case.folder / "out", *rules)


def archive(case: Case) -> None:
    """A zip file of any content in the place of the id maps."""
    path, buffer = case.folder / "set" / "vocabulary.npz", io.BytesIO()
    with zipfile.ZipFile(buffer, "w", case.chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for c in range(1, 27):
            file.writestr(f"C{c}.npy", bytes(case.chance.choice([0, 10, 10**4, 10**6])))
    path.write_bytes(case.mutate(buffer.getvalue(), 3))
    _tell(case.folder / "set", path.name)
    case.gpu_etl("verify", case.folder / "set")


KINDS = {
    kind.__name__: kind
    for kind in (
        text, parquet, squeezed, manifest, vocabulary, archive, feature_spec, split_files, npy_days, config, plan,
        state, tensors, flag_file, bombs,
    )
}  # fmt: skip
