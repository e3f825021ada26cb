"""The device that trains. What was asked for is what runs, or an error."""

from pathlib import Path

import torch

from model.config import ConfigError


def choose_device(name: str) -> torch.device:
    """torch device for "cpu", "cuda", or "auto" (the GPU where there is one). Raises ConfigError for a missing GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; check `nvidia-smi` and the torch build, or --device cpu")
    return torch.device(name)


def set_threads(wanted: int, before: int | None = None) -> str | None:
    """Use `wanted` CPU threads; 0: as many as `before`, or torch's choice where that is None.

    Returns words where the number differs from `before`: sums then go in another order, and their last bits differ.
    """
    if wanted or before:
        torch.set_num_threads(wanted or before)
    if before and wanted not in (0, before):
        return f"{wanted} CPU threads, {before} before the checkpoint: the run will not end with quite the same bits"
    return None


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones: by AMX, or by AMD's AVX-512 BF16.

    Intel's AVX-512 BF16 alone does not: measured on a Xeon of family 6, model 207 without AMX, 155 against 310 GFLOP/s.
    """
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words
