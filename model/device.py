"""The device that trains. What was asked for is what runs, or an error (leaf)."""

import torch

from model.config import ConfigError


def choose_device(name: str) -> torch.device:
    """torch device for "cpu", "cuda", or "auto" (the GPU where there is one). Raises ConfigError for a missing GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; check `nvidia-smi` and the torch build, or --device cpu")
    return torch.device(name)
