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

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.checksum import crc32
from model.config import ConfigError, ModelConfig
from model.dlrm import DLRM
from model.table_files import Stored, name_of, on_every_rank, parts_of

MLPS, STATE = "mlps.safetensors", "state.json"
VERSION = 2
STEP_FOLDER = re.compile(r"step_(\d+)")


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or belongs to something else."""


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


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold: this rank's files and their tensors, and the JSON state."""

    files: dict[str, dict[str, torch.Tensor]]
    state: dict


def content(trainer, state: dict, ranks=None, copy: bool = False) -> Content:
    """An trainer.Trainer as it is now, and `state`, any JSON object. copy: into host memory, so that the trainer can go
    on before it is written."""
    files = _files(trainer, *((ranks.rank, ranks.world) if ranks else (0, 1)))
    if copy:
        files = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
    about = {
        "model": trainer.model.config.to_json(), "optimizers": trainer.optimizer_names(), "steps": trainer.steps,
        "loss_scale": trainer.loss_scale.state() if trainer.loss_scale else None,
    }  # fmt: skip
    return Content(files, {"version": VERSION, **about, **state})


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

    def write_files() -> dict[str, dict]:
        if not temporary.is_dir():
            raise OSError(f"{temporary}: made by rank 0, not seen by rank {rank}: expected a folder that all share")
        for name, tensors in what.files.items():
            save_file(tensors, temporary / name)
            _to_disk(temporary / name)
        return {name: _describe(temporary / name) for name in what.files}

    def finish() -> None:
        state = {**what.state, "files": dict(sorted(described.items()))}
        (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n")
        _to_disk(temporary / STATE)
        _replace(temporary, folder)

    try:
        _together(ranks, folder, make_folder if rank == 0 else None)
        described = {name: found for files in _together(ranks, folder, write_files) for name, found in files.items()}
        _together(ranks, folder, finish if rank == 0 else None)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


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


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Rename a folder over another; the old one is whole under one of two names until the new one is there."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(steps, path) of the checkpoints called step_N in a run's folder, the oldest first."""
    names = ((STEP_FOLDER.fullmatch(path.name), path) for path in Path(folder).glob("step_*"))
    return sorted((int(match[1]), path) for match, path in names if match and (path / STATE).is_file())


def find(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the latest one in it. Raises CheckpointError where there is none."""
    folder = Path(folder)
    if (folder / STATE).is_file():
        return folder
    found = steps_in(folder)
    if not found:
        raise CheckpointError(
            f"--ckpt {folder}: no {STATE} and no step_N there; expected a checkpoint, or a run's folder with some in it"
        )
    return found[-1][1]


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint. Raises CheckpointError where it is missing, damaged or of another version."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"--ckpt {folder}: no {STATE} there; expected a checkpoint that train.py wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint") from error
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {state.get('version')}")
    return state


def _check_files(folder: Path, state: dict, ranks=None) -> None:
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    for name, expected in list(state["files"].items())[rank::world]:  # many ranks: each looks at some of the files
        path = folder / name
        found = _describe(path) if path.is_file() else "nothing"
        if found != expected:
            raise CheckpointError(f"{path}: damaged (expected {expected}, found {found}); use an earlier checkpoint")


def load(folder: Path, model: DLRM, ranks=None) -> dict:
    """Fill the model (of `ranks`: this one's part of it) with a checkpoint's weights; returns its state.

    Raises CheckpointError where it is of another model or damaged, before anything is changed.
    """
    folder = Path(folder)
    state = read_state(folder)
    saved = ModelConfig.from_json(state["model"], str(folder / STATE))
    if saved != model.config:
        ours, theirs = model.config.to_json(), saved.to_json()
        keys = [key for key in ours if ours[key] != theirs[key]]
        different = "; ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in keys)
        raise CheckpointError(f"--ckpt {folder}: made with another model: {different}")
    _check_files(folder, state, ranks)
    try:
        model.load_state_dict(load_file(folder / MLPS), strict=False)
        stored = Stored(folder, state["files"], "tables")
        with torch.no_grad():
            for part in parts_of(model.embedding):
                stored.read(part, "", part.weight)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"--ckpt {folder}: damaged ({error}); use an earlier checkpoint") from error
    return state


def restore(folder: Path, trainer, ranks=None) -> dict:
    """Fill an trainer.Trainer with a checkpoint, so that it goes on as if it had never stopped; returns the state.

    Raises CheckpointError as load() does, and where the optimisers are others.
    """
    folder = Path(folder)
    optimizers = read_state(folder)["optimizers"]
    if optimizers != trainer.optimizer_names():
        ours = trainer.optimizer_names()
        raise CheckpointError(f"--ckpt {folder}: made with the optimisers {optimizers}, this run has {ours}")
    state = load(folder, trainer.model, ranks)
    stored = Stored(folder, state["files"], "optimizer")
    with torch.no_grad():
        for part in parts_of(trainer.model.embedding):
            for key, tensor in part.state.items():
                stored.read(part, key, tensor)
    mlps: dict[int, dict] = {}
    for name, tensor in stored.others.items():
        _, number, key = name.split(".")
        mlps.setdefault(int(number), {})[key] = tensor
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": mlps})
    trainer.steps = state["steps"]
    if trainer.loss_scale and state.get("loss_scale"):
        trainer.loss_scale.restore(state["loss_scale"])
    return state


def remove(folder: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves nothing that looks like one."""
    shutil.rmtree(folder.rename(folder.with_name(folder.name + ".old")), ignore_errors=True)
