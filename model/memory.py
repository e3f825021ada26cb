"""Words for a device, or a machine, that has no memory left."""

import re
from contextlib import contextmanager
from pathlib import Path

import torch

from model.config import ConfigError, ModelConfig
from model.layers.optimizers import Optimizer

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
CGROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
ASKED = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ [KMGT]iB)", re.IGNORECASE)


def shortage(error: BaseException) -> str | None:
    """What was asked for, and what the device has, where an error says that memory ran out; else None."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not SIGNS.search(str(error)):
        return None
    asked = ASKED.search(str(error))
    first = str(error).splitlines()[0] if str(error) else "no memory left"
    words = f"{_gigabytes(asked[1])} more were wanted" if asked else first
    if torch.cuda.is_available() and "DefaultCPUAllocator" not in str(error):
        free, total = torch.cuda.mem_get_info()
        words += f"; of the GPU's {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        words += f" and {torch.cuda.memory_allocated() / 1e9:.1f} GB hold this run's tensors"
    return words


def _gigabytes(asked: str) -> str:
    return f"{int(asked.split()[0]) / 1e9:,.1f} GB" if asked.endswith("bytes") else asked


def available(device: torch.device) -> int:
    """Bytes that this process can still have on a device; on a CPU without taking them from other programs, within what
    the machine and its container have."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines}
    free = 1024 * (kilobytes["MemAvailable:"] + kilobytes["SwapFree:"])
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def check_tables(config: ModelConfig, optimizer: Optimizer, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError where the tables cannot fit a device: the system may grant what it does not have, and then end
    the process in the midst of filling it."""
    needed, free = table_bytes(config, optimizer, dtype), available(device)
    if sum(needed) > free:
        raise ConfigError(
            f"out of memory: {tables(config, optimizer, dtype)}; {free / 1e9:.1f} GB are free on the device "
            f"{device.type}; {SMALLER_TABLES}"
        )


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


def table_bytes(config: ModelConfig, optimizer: Optimizer, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a model's tables, and of what their optimiser remembers."""
    rows = sum(config.categorical_feature_sizes)
    with torch.device("meta"):
        remembered = optimizer.table_state(rows, config.embedding_dim).values()
    return rows * config.embedding_dim * dtype.itemsize, sum(tensor.nbytes for tensor in remembered)


def tables(config: ModelConfig, optimizer: Optimizer, dtype: torch.dtype) -> str:
    """What a model's tables are, with the gigabytes that they and their optimiser's memory take."""
    weights, state = table_bytes(config, optimizer, dtype)
    rows, kind = sum(config.categorical_feature_sizes), str(dtype).removeprefix("torch.")
    found = f"{rows:,} embedding rows of {config.embedding_dim} take {weights / 1e9:,.1f} GB in {kind}"
    return found + (f", and {state / 1e9:,.1f} GB more for --embedding_optimizer {optimizer.name}" if state else "")
