"""state.json of a checkpoint: everything that is no tensor, with a checksum of its own."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import typed
from model.config import ConfigError, ModelConfig

STATE = "state.json"
VERSION = 3
MOST_STEPS = 2**53
DIGEST = "sha256"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or belongs to something else."""


@dataclass(frozen=True)
class FileEntry:
    """A file's size and CRC-32 (8 hex digits)."""

    __pydantic_config__ = typed.STRICT

    bytes: int
    crc32: str


@dataclass(frozen=True)
class ScaleState:
    """loss_scale.LossScale.state()."""

    __pydantic_config__ = typed.STRICT

    scale: float
    good: int
    skipped: int

    def __post_init__(self):
        if not self.scale > 0 or self.good < 0 or self.skipped < 0:
            raise ValueError(f"expected a scale above 0, and counts of 0 or more, got {self}")


@dataclass(frozen=True)
class Optimizers:
    """Names of those of the MLPs and of the tables."""

    __pydantic_config__ = typed.STRICT

    mlps: str
    tables: str


@dataclass(frozen=True)
class State:
    """model: its configuration; steps: done; loss_scale: None without float16; run: what the run that wrote it says of
    itself, any JSON object (runs.RunState); files: by name, all the checkpoint's others."""

    __pydantic_config__ = typed.STRICT

    version: int
    model: ModelConfig
    optimizers: Optimizers
    steps: int
    loss_scale: ScaleState | None
    run: dict[str, Any]
    files: dict[str, FileEntry]

    def __post_init__(self):
        if not 0 <= self.steps < MOST_STEPS:
            raise ValueError(f"steps: expected 0 to {MOST_STEPS - 1}, got {self.steps}")
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"files: expected names of files beside {STATE}, got {name!r}")

    def to_text(self) -> str:
        """The file's text."""
        values = asdict(self)
        return json.dumps({**values, DIGEST: _digest(values)}, indent=1, allow_nan=False) + "\n"


def _digest(values: dict) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_state(folder: Path) -> State:
    """The state of a checkpoint. Raises CheckpointError where it is missing, damaged or of another version."""
    path = Path(folder) / STATE
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"--ckpt {folder}: no {STATE} there; expected a checkpoint that train.py wrote") from None
    values = typed.parse_json(text, str(path), CheckpointError)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else values
        raise CheckpointError(f"{path}: expected version {VERSION}, got {found!s:.80}")
    digest = values.pop(DIGEST, None)
    if digest != _digest(values):
        raise CheckpointError(
            f"{path}: damaged: its {DIGEST} is not that of what it says (expected {_digest(values)}, got {digest}); "
            "use an earlier checkpoint"
        )
    return typed.read(State, values, str(path), CheckpointError)
