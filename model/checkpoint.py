"""Checkpoints: a folder of safetensors files (weights) and one JSON file (everything else). Nothing is pickled.

    mlps.safetensors     bottom.* and top.*, float32
    tables.safetensors   table_00 ... table_25, float32 [rows, D]; slices of rows can be read without the rest
    state.json           model configuration, steps done, and what fixes the place in the data
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model.config import ConfigError, ModelConfig
from model.dlrm import DLRM

MLPS, TABLES, STATE = "mlps.safetensors", "tables.safetensors", "state.json"
VERSION = 1


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or belongs to something else."""


def _mlp_tensors(model: DLRM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("bottom.", "top."))}


def save(folder: Path, model: DLRM, state: dict) -> None:
    """Write a checkpoint folder, whole or not at all: under a temporary name first, then renamed.

    `state` is any JSON object. A checkpoint of the same name is replaced.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_mlp_tensors(model), temporary / MLPS)
        save_file({f"table_{t:02}": table for t, table in enumerate(model.embedding.tables())}, temporary / TABLES)
        content = {"version": VERSION, "model": model.config.to_json(), **state}
        (temporary / STATE).write_text(json.dumps(content, indent=1) + "\n")
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> dict:
    """The JSON state of a checkpoint. Raises CheckpointError where it is missing, damaged or of another version."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"--ckpt {folder}: no {STATE} there; expected a folder that --save_model wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint") from error
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {state.get('version')}")
    return state


def load(folder: Path, model: DLRM) -> dict:
    """Fill the model with a checkpoint's weights; returns its state.

    Raises CheckpointError where it is of another model (before anything is changed), or damaged.
    """
    folder = Path(folder)
    state = read_state(folder)
    saved = ModelConfig.from_json(state["model"], str(folder / STATE))
    if saved != model.config:
        ours, theirs = model.config.to_json(), saved.to_json()
        keys = [key for key in ours if ours[key] != theirs[key]]
        different = "; ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in keys)
        raise CheckpointError(f"--ckpt {folder}: made with another model: {different}")
    try:
        model.load_state_dict(load_file(folder / MLPS), strict=False)
        with safe_open(folder / TABLES, "pt") as tables, torch.no_grad():
            for t, table in enumerate(model.embedding.tables()):
                table.copy_(tables.get_tensor(f"table_{t:02}"))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"--ckpt {folder}: damaged ({error}); use an earlier checkpoint") from error
    return state
