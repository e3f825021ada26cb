"""Checkpoints: a folder of safetensors files (tensors) and one JSON file (everything else). Nothing is pickled.

    mlps.safetensors       bottom.*, interaction.* and top.*, float32
    tables.safetensors     table_00 ... table_25 [rows, D] in the model's type; slices of rows can be read alone
    optimizer.safetensors  mlps.<number>.<name>, and table_00.<name> ...: what the optimisers remember; none for SGD
    state.json             model configuration, optimisers, steps done, loss scale, size and CRC-32 of each file, the
                           run's state

Many ranks (ranks.Ranks) write side by side, each the pieces that it holds: tables.<rank>.safetensors and
optimizer.<rank>.safetensors; a piece of a table is called table_03[1000:2000,0:64], by its rows and columns. Any number
of ranks reads what any other wrote, a process alone included.

Tables load into a model whose tables are of another type: exactly into a wider one, rounded to nearest into a narrower.
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from common import atomic
from model.checkpoint.checksum import crc32
from model.checkpoint.state import STATE, VERSION, CheckpointError, FileEntry, Optimizers, ScaleState, State, read_state
from model.checkpoint.table_slices import Stored, StoredError, name_of, on_every_rank, parts_of
from model.dlrm import DLRM

MLPS = "mlps.safetensors"
STEP_FOLDER = re.compile(r"step_(\d+)")
RUN_FOLDERS = "run_*"  # within an --output_dir that is another run's (runs.py)
# What torch's optimisers of the MLPs remember of a parameter, by our names for them.
MLP_MEMORY = {"sgd": (), "rowwise_adagrad": ("step", "sum"), "adagrad": ("step", "sum"),
              "adam": ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip


def _mlp_tensors(model: DLRM) -> dict[str, torch.Tensor]:
    wanted = ("bottom.", "interaction.", "top.")
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(wanted)}


def _files(trainer, rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """The files that a rank writes, and their tensors; what all ranks hold is rank 0's to write."""
    model, mine = trainer.model, f".{rank}" if world > 1 else ""
    parts = [part for part in parts_of(model.embedding) if rank == 0 or not on_every_rank(model.embedding, part.table)]
    tables = {name_of(part, model.config): part.weight for part in parts}
    memory = {f"{name_of(part, model.config)}.{key}": t.contiguous() for part in parts for key, t in part.state.items()}
    files = {f"tables{mine}.safetensors": tables, f"optimizer{mine}.safetensors": memory}
    if rank:
        return files
    states = trainer.optimizer.state_dict()["state"].items()
    mlps = {f"mlps.{i}.{key}": value for i, state in states for key, value in state.items() if value is not None}
    files[f"optimizer{mine}.safetensors"] = mlps | memory
    return {MLPS: _mlp_tensors(model), **files}


def _describe(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, crc32(path))


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold: this rank's files and their tensors, and the state, its `files` yet to come."""

    files: dict[str, dict[str, torch.Tensor]]
    state: State


def content(trainer, state: dict, ranks=None, copy: bool = False) -> Content:
    """A trainer.Trainer as it is now, and `state`, what the run says of itself, any JSON object. copy: into host
    memory, so that the trainer can go on before it is written."""
    files = _files(trainer, *((ranks.rank, ranks.world) if ranks else (0, 1)))
    if copy:
        files = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
    scale = ScaleState(**trainer.loss_scale.state()) if trainer.loss_scale else None
    names = Optimizers(**trainer.optimizer_names())
    return Content(files, State(VERSION, trainer.model.config, names, trainer.steps, scale, state, {}))


def save(folder: Path, trainer, state: dict, ranks=None) -> None:
    """write() of what a trainer and `state`, any JSON object, are now."""
    write(folder, content(trainer, state, ranks), ranks)


def write(folder: Path, what: Content, ranks=None) -> None:
    """Write a checkpoint, whole or not at all: under a temporary name first, then renamed.

    A checkpoint of the same name is replaced. ranks: all of them write it together, into a folder that all see. Raises
    OSError (on every rank) where the disk fails or is full; what was there before stays whole.
    """
    folder = Path(folder)
    rank = ranks.rank if ranks else 0
    temporary = folder.with_name(folder.name + ".part")

    def make_folder() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write_files() -> dict[str, FileEntry]:
        if not temporary.is_dir():
            raise OSError(f"{temporary}: made by rank 0, not seen by rank {rank}: expected a folder that all share")
        for name, tensors in what.files.items():
            _save_tensors(tensors, temporary / name)
        return {name: _describe(temporary / name) for name in what.files}

    def finish() -> None:
        atomic.write_text(temporary / STATE, replace(what.state, files=dict(sorted(described.items()))).to_text())
        atomic.replace_folder(temporary, folder)

    try:
        _together(ranks, folder, make_folder if rank == 0 else None)
        described = {name: found for files in _together(ranks, folder, write_files) for name, found in files.items()}
        _together(ranks, folder, finish if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file on the disk, readable by whoever may read other new files: safetensors' own is the owner's."""
    with open(path, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file(tensors, path)
    path.chmod(mode & 0o777)
    atomic.to_disk(path)


def _together(ranks, folder: Path, action) -> list:
    """Do `action` (None: nothing) on every rank; returns what it gave on each. Raises OSError on all where one did."""
    found, error = None, None
    try:
        found = action() if action else None
    except (SafetensorError, OSError) as failed:
        error = f"{folder}: could not be written ({failed})"
    answers = ranks.everyone((found, error)) if ranks else [(found, error)]
    errors = [f"rank {rank}: {error}" if ranks else error for rank, (_, error) in enumerate(answers) if error]
    if errors:
        raise OSError(errors[0])
    return [found for found, _ in answers]


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(steps, path) of the checkpoints called step_N in a run's folder, the oldest first."""
    names = ((STEP_FOLDER.fullmatch(path.name), path) for path in Path(folder).glob("step_*"))
    return sorted((int(match[1]), path) for match, path in names if match and (path / STATE).is_file())


def latest(folder: Path) -> Path | None:
    """The latest checkpoint of the one run that has some in a folder; None where there is none.

    Raises CheckpointError where several runs have (which of them is meant, nobody can know), and where a later one has
    lost its state.
    """
    folder = Path(folder)
    runs = [found for of in (folder, *sorted(folder.glob(RUN_FOLDERS))) if (found := steps_in(of))]
    if len(runs) > 1:
        ends = ", ".join(str(found[-1][1]) for found in runs)
        raise CheckpointError(f"--ckpt {folder}: {len(runs)} runs have checkpoints there; name one of {ends}")
    if not runs:
        return None
    steps, found = runs[0][-1]
    for path in found.parent.glob("step_*"):
        if (match := STEP_FOLDER.fullmatch(path.name)) and int(match[1]) > steps:
            raise CheckpointError(f"{path}: damaged (no {STATE} in it); delete it, or name an earlier one, {found}")
    return found


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the latest one in it. Raises CheckpointError where there is none, or where
    they are of several runs."""
    folder = Path(folder)
    if (folder / STATE).is_file():
        return folder
    found = latest(folder)
    if not found:
        raise CheckpointError(
            f"--ckpt {folder}: no {STATE} and no step_N there; expected a checkpoint, or a run's folder with some in it"
        )
    return found


def _damaged(folder: Path, what: object) -> CheckpointError:
    return CheckpointError(f"--ckpt {folder}: damaged ({what}); use an earlier checkpoint")


def _check_files(folder: Path, state: State, ranks=None) -> None:
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    if MLPS not in state.files:
        raise _damaged(folder, f"{STATE} lists no {MLPS}")
    for name, expected in list(state.files.items())[rank::world]:  # many ranks: each looks at some of the files
        path = folder / name
        found = _describe(path) if path.is_file() else None
        if found != expected:
            is_ = asdict(found) if found else "nothing"
            raise CheckpointError(
                f"{path}: damaged (expected {asdict(expected)}, found {is_}); use an earlier checkpoint"
            )


def _differences(expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    """Words for tensors that are not there, too many, or of another shape or type; "" where there are none."""
    keys = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    words = [f"{key}: expected {expected.get(key, 'no such tensor')}, found {found.get(key, 'none')}" for key in keys]
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def _check_mlps(folder: Path, model: DLRM) -> None:
    """Raise CheckpointError unless the file has exactly the model's tensors."""
    with safe_open(folder / MLPS, "pt") as file:
        found = {name: (file.get_tensor(name).dtype, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118 - no dict
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _mlp_tensors(model).items()}
    if words := _differences(expected, found):
        raise _damaged(folder, f"{MLPS}: {words}")


def _opened(folder: Path, model: DLRM, ranks) -> tuple[State, Stored]:
    """The state, and the tables' weights; everything that a model needs is checked to be there."""
    state = read_state(folder)
    if state.model != model.config:
        ours, theirs = model.config.to_json(), state.model.to_json()
        keys = [key for key in ours if ours[key] != theirs[key]]
        different = "; ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in keys)
        raise CheckpointError(f"--ckpt {folder}: made with another model: {different}")
    _check_files(folder, state, ranks)
    _check_mlps(folder, model)
    stored = Stored(folder, state.files, "tables")
    stored.check(model.config, {"": 2})
    if stored.others:
        raise StoredError(f"tables: expected no {', '.join(sorted(stored.others))}")
    return state, stored


def _fill(folder: Path, model: DLRM, stored: Stored) -> None:
    model.load_state_dict(load_file(folder / MLPS), strict=False)  # of the MLPs all are there: _check_mlps()
    with torch.no_grad():
        for part in parts_of(model.embedding):
            stored.read(part, "", part.weight)


def load(folder: Path, model: DLRM, ranks=None) -> State:
    """Fill the model (of `ranks`: this one's part of it) with a checkpoint's weights; returns its state.

    Raises CheckpointError where it is of another model, damaged or not complete, before anything is changed.
    """
    folder = Path(folder)
    try:
        state, stored = _opened(folder, model, ranks)
        _fill(folder, model, stored)
    except (SafetensorError, OSError, StoredError) as error:
        raise _damaged(folder, error) from error
    return state


def _mlp_memory(stored: Stored, trainer, steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """What the MLPs' optimiser remembered, by the parameter's number. Raises StoredError where it is not complete."""
    parameters, keys = trainer.model.dense_parameters(), MLP_MEMORY[trainer.optimizer_names()["mlps"]]
    expected = {
        f"mlps.{i}.{key}": () if key == "step" else tuple(parameter.shape)
        for i, parameter in enumerate(parameters) for key in keys
    }  # fmt: skip
    found = {name: tuple(tensor.shape) for name, tensor in stored.others.items()}
    if not steps and not found:  # Adam begins to remember with the first step
        return {}
    if words := _differences(expected, found):
        raise StoredError(f"optimizer: {words}")
    return {i: {key: stored.others[f"mlps.{i}.{key}"] for key in keys} for i in range(len(parameters)) if keys}


def restore(folder: Path, trainer, ranks=None) -> State:
    """Fill a trainer.Trainer with a checkpoint, so that it goes on as if it had never stopped; returns the state.

    Raises CheckpointError as load() does, and where the optimisers are others.
    """
    folder = Path(folder)
    theirs, ours = asdict(read_state(folder).optimizers), trainer.optimizer_names()
    if theirs != ours:
        raise CheckpointError(f"--ckpt {folder}: made with the optimisers {theirs}, this run has {ours}")
    try:
        state, stored = _opened(folder, trainer.model, ranks)
        memory = Stored(folder, state.files, "optimizer")
        optimizer = trainer.model.embedding.optimizer
        memory.check(state.model, {key: tensor.dim() for key, tensor in optimizer.table_state(1, 1).items()})
        mlps = _mlp_memory(memory, trainer, state.steps)
        _fill(folder, trainer.model, stored)
        with torch.no_grad():
            for part in parts_of(trainer.model.embedding):
                for key, tensor in part.state.items():
                    memory.read(part, key, tensor)
    except (SafetensorError, OSError, StoredError) as error:
        raise _damaged(folder, error) from error
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": mlps})
    trainer.steps = state.steps
    if trainer.loss_scale and state.loss_scale:
        trainer.loss_scale.restore(asdict(state.loss_scale))
    return state
