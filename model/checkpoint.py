"""Checkpoints: a folder of safetensors files (tensors) and one JSON file (everything else). Nothing is pickled.

    mlps.safetensors       bottom.*, interaction.* and top.*, float32
    tables.safetensors     table_00 ... table_25 [rows, D] in the model's type; slices of rows can be read alone
    optimizer.safetensors  mlps.<number>.<name>, and table_00.<name> ...: what the optimisers remember; none for SGD
    state.json             model configuration, optimisers, steps done, loss scale, size and CRC-32 of each file, the
                           run's state

Tables load into a model whose tables are of another type: exactly into a wider one, rounded to nearest into a narrower.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model.config import ConfigError, ModelConfig
from model.dlrm import DLRM

MLPS, TABLES, OPTIMIZER, STATE = "mlps.safetensors", "tables.safetensors", "optimizer.safetensors", "state.json"
VERSION = 2
BLOCK = 1 << 20
STEP_FOLDER = re.compile(r"step_(\d+)")


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or belongs to something else."""


def _mlp_tensors(model: DLRM) -> dict[str, torch.Tensor]:
    wanted = ("bottom.", "interaction.", "top.")
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(wanted)}


def _table_state(model: DLRM) -> dict[str, torch.Tensor]:
    """The table optimiser's tensors by table: views."""
    return {
        f"table_{t:02}.{name}": part
        for name, tensor in model.embedding.state().items()
        for t, part in enumerate(tensor.split(model.embedding.sizes))
    }


def _optimizer_tensors(trainer) -> dict[str, torch.Tensor]:
    states = trainer.optimizer.state_dict()["state"].items()
    mlps = {f"mlps.{i}.{name}": value for i, state in states for name, value in state.items() if value is not None}
    return mlps | _table_state(trainer.model)


def _crc32(path: Path) -> str:
    crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc32 = isal_zlib.crc32(block, crc32)
    return f"{crc32:08x}"


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def save(folder: Path, trainer, state: dict) -> None:
    """Write a checkpoint of an engine.Trainer, whole or not at all: under a temporary name first, then renamed.

    `state` is any JSON object beside the trainer's own. A checkpoint of the same name is replaced. Raises OSError where
    the disk fails or is full; what was there before stays whole.
    """
    folder, model = Path(folder), trainer.model
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_mlp_tensors(model), temporary / MLPS)
        save_file({f"table_{t:02}": table for t, table in enumerate(model.embedding.tables())}, temporary / TABLES)
        save_file({name: t.contiguous() for name, t in _optimizer_tensors(trainer).items()}, temporary / OPTIMIZER)
        content = {
            "version": VERSION, "model": model.config.to_json(), "optimizers": trainer.optimizer_names(),
            "steps": trainer.steps, "loss_scale": trainer.loss_scale.state() if trainer.loss_scale else None,
            **state, "files": {p.name: _describe(p) for p in sorted(temporary.iterdir())},
        }  # fmt: skip
        (temporary / STATE).write_text(json.dumps(content, indent=1) + "\n")
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _check_files(folder: Path, state: dict) -> None:
    for name, expected in state["files"].items():
        path = folder / name
        found = _describe(path) if path.is_file() else "nothing"
        if found != expected:
            raise CheckpointError(f"{path}: damaged (expected {expected}, found {found}); use an earlier checkpoint")


def load(folder: Path, model: DLRM) -> dict:
    """Fill the model with a checkpoint's weights; returns its state.

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
    _check_files(folder, state)
    try:
        model.load_state_dict(load_file(folder / MLPS), strict=False)
        with safe_open(folder / TABLES, "pt") as tables, torch.no_grad():
            for t, table in enumerate(model.embedding.tables()):
                table.copy_(tables.get_tensor(f"table_{t:02}"))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"--ckpt {folder}: damaged ({error}); use an earlier checkpoint") from error
    return state


def restore(folder: Path, trainer) -> dict:
    """Fill an engine.Trainer with a checkpoint, so that it goes on as if it had never stopped; returns the state.

    Raises CheckpointError as load() does, and where the optimisers are others.
    """
    folder = Path(folder)
    optimizers = read_state(folder)["optimizers"]
    if optimizers != trainer.optimizer_names():
        ours = trainer.optimizer_names()
        raise CheckpointError(f"--ckpt {folder}: made with the optimisers {optimizers}, this run has {ours}")
    state = load(folder, trainer.model)
    tensors = load_file(folder / OPTIMIZER)
    with torch.no_grad():
        for name, part in _table_state(trainer.model).items():
            part.copy_(tensors.pop(name))
    mlps: dict[int, dict] = {}
    for name, tensor in tensors.items():
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
