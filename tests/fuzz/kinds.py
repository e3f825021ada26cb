"""What is fuzzed: for each kind of input, how a case is made of a seed, which commands read it, and how it must end.

Every case ends with status 0 and a last line of JSON, or with one error in words. Text and Parquet are held against
tests/reference.py as well: what is right there must come out right, what is wrong must be refused or left out.
"""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

import train
from gpu_etl.manifest import describe_file
from model.plan_command import main as sharding
from model.state import _digest
from tests.fuzz.case import FLAGS, TINY, Case, WrongError
from tests.fuzz.raw import bombs, parquet, squeezed, text
from tests.gpu_etl import tamper
from tests.reference import encode_days, parse_row, write_rows


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
