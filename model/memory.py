"""Words for a device, or a machine, that has no memory left (leaf)."""

import re
from contextlib import contextmanager

import torch

from model.config import ConfigError, ModelConfig
from model.optimizers import Optimizer

# torch's own class covers its allocator on a GPU only. The rest: its allocator on a CPU, the CUDA runtime and driver
# (Triton's launches, graphs, pinned memory), and the libraries that allocate a workspace.
SIGNS = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|_ALLOC_FAILED|not enough memory|DefaultCPUAllocator",
    re.IGNORECASE,
)
SMALLER_TABLES = (
    "take --embedding_dtype bfloat16 (half of it), --table_placement host (the machine's memory), another "
    "--embedding_optimizer, fewer rows (gpu_etl encode --min-count), or dist_train.py on more GPUs"
)
ASKED = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ [KMGT]iB)", re.IGNORECASE)


def shortage(error: BaseException) -> str | None:
    """What was asked for, and what the device has, where an error says that memory ran out; else None."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not SIGNS.search(str(error)):
        return None
    asked = ASKED.search(str(error))
    words = f"{asked[1]} more were wanted" if asked else str(error).splitlines()[0] if str(error) else "no memory left"
    if torch.cuda.is_available() and "DefaultCPUAllocator" not in str(error):
        free, total = torch.cuda.mem_get_info()
        words += f"; of the GPU's {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        words += f" and {torch.cuda.memory_allocated() / 1e9:.1f} GB hold this run's tensors"
    return words


@contextmanager
def explained(what: str, advice: str):
    """Turn an error about memory inside into a ConfigError: what ran out of memory, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = shortage(error)
        if words is None:
            raise
        raise ConfigError(f"out of memory: {what}: {words}; {advice}") from error


def tables(config: ModelConfig, optimizer: Optimizer, dtype: torch.dtype) -> str:
    """What a model's tables are, with the gigabytes that they and their optimiser's memory take."""
    rows = sum(config.categorical_feature_sizes)
    with torch.device("meta"):
        remembered = optimizer.table_state(rows, config.embedding_dim).values()
    weights = rows * config.embedding_dim * dtype.itemsize
    found = f"{rows:,} embedding rows of {config.embedding_dim} take {weights / 1e9:.1f} GB in {dtype}".replace(
        "torch.", ""
    )
    state = sum(tensor.nbytes for tensor in remembered)
    return found + (f", and {state / 1e9:.1f} GB more for --embedding_optimizer {optimizer.name}" if state else "")
