"""The slab functions of cpu.py on a GPU: Numba kernels that call the same scalar functions of rows.py.

A slab's rows stay on the device between the functions; only faults, labels, counts and finished rows come back.
Everything is integers, so the results are the CPU's, to the bit.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numba import config, cuda

from gpu_etl import cuda_direct, rows
from gpu_etl.cpu import set_threads
from gpu_etl.cuda_dictionary import Dictionaries
from gpu_etl.cuda_direct import direct_slabs
from gpu_etl.cuda_encode import Finisher, group, rows_of
from gpu_etl.cuda_keep import keep
from gpu_etl.cuda_kernel import blocks_for, kernel
from gpu_etl.cuda_launch import (
    Input,
    budget,
    download,
    enter_thread,
    host_bytes,
    launch,
    synchronize,
    upload_array,
)
from gpu_etl.cuda_parquet import parquet_slabs
from gpu_etl.cuda_rows import COUNTERS, MISSING, VALUES, Rows, Table, parse, parser, rows_end, summarize_on_device
from gpu_etl.cuda_text import find_rows
from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE
from gpu_etl.source import Slab
from gpu_etl.tally import Summary

__all__ = [
    "Dictionaries", "Finisher", "enter_thread", "find_rows", "group", "host_bytes", "integers", "keep", "keep_rows",
    "labels", "parse", "peak_device_bytes", "readers", "require_gpu", "rows_end", "rows_of", "set_memory_limit",
    "set_threads", "summarize", "synchronize", "upload",
]  # fmt: skip

SLAB_BYTES = 64 << 20  # of text: some milliseconds of copying, so that starting kernels costs little beside it
ENCODE_ROWS = 1 << 18
CORES_PER_READER = 3  # the host only reads and writes
CORES_PER_WRITER = 3
BUCKET_BYTES = 256 << 20  # of the shuffle: each costs a sort and some copies, whatever its size
TOOLKIT = Path("/usr/local/cuda")


@kernel(COUNTERS)
def _probe(found):
    if cuda.grid(1) == 0:
        found[0] = 41 + 1


def require_gpu() -> None:
    """Raise DataError, with what to do, where Numba cannot compile for a GPU and run there what it compiled."""
    if TOOLKIT.is_dir() and not os.environ.get("CUDA_HOME"):
        os.environ["CUDA_HOME"] = str(TOOLKIT)  # where Numba does not look by itself
    try:
        found = upload_array(np.zeros(1, np.int64))
        launch(_probe, 1, found)
        assert download(found)[0] == 42, "a kernel ran, and wrote nothing"
    except Exception as error:  # Numba raises many kinds, down to one per missing library
        raise DataError(
            f"--device cuda: Numba finds no usable GPU ({str(error).strip() or type(error).__name__}); check "
            "`nvidia-smi` (driver for CUDA 13, or `pip install numba-cuda[cu12]` for 12) and, where a toolkit is "
            "installed, CUDA_HOME; `python -m gpu_etl doctor` says more; or --device cpu"
        ) from error
    if not config.ENABLE_CUDASIM and not importlib.util.find_spec("cupy"):
        raise DataError("--device cuda: CuPy is missing; `pip install -r requirements-gpu.txt`, or --device cpu")


def set_memory_limit(limit: int) -> None:
    """Hold the device memory that the functions here take under so many bytes, 0: no limit."""
    budget.limit = limit


def readers() -> dict[str, Callable[..., Iterator[Slab]]]:
    """Ways of its own to read a kind of day file: Parquet, and plain text where storage can be read directly."""
    return {"parquet": parquet_slabs} | ({"text": direct_slabs} if cuda_direct.is_there() else {})


def peak_device_bytes() -> int:
    """The most device memory that was in use."""
    return budget.peak


def upload(values: np.ndarray, missing: np.ndarray) -> tuple[Rows, object]:
    """Values and missing of a slab that another parser made, in device memory of their own."""
    count = len(values)
    made = Table("uploaded rows").take(max(1, count))
    if count:
        made = Rows(upload_array(np.asfortranarray(values)), upload_array(missing), count)
    made.count = count
    return made, made.missing


def labels(values: Rows) -> np.ndarray:
    """The labels of a parsed slab, uint32 [n], on the host."""
    return download(values.values[: len(values), 0]) if len(values) else np.empty(0, np.uint32)


@kernel(VALUES, MISSING, "int64[::1]", "int64", VALUES, MISSING)
def _keep(values, missing, kept, count, new_values, new_missing):
    i, column = cuda.grid(1), cuda.blockIdx.y
    if i < count:
        new_values[i, column] = values[kept[i], column]
        if column == 0:
            new_missing[i] = missing[kept[i]]


_kept, _places = Table("rows that stay"), Input("rows that stay", np.int64)


def keep_rows(values: Rows, missing, keep: np.ndarray) -> tuple[Rows, object]:
    """Values and missing of the rows where keep, bool [n] on the host, is true; until the next call."""
    kept = np.flatnonzero(keep)
    new = _kept.take(len(kept))
    if len(kept):
        grid = blocks_for(len(kept)), COLUMNS
        launch(_keep, grid, values.values, missing, _places.put(kept), len(kept), new.values, new.missing)
    return new, new.missing


def summarize(values: Rows, missing) -> Summary:
    """What there is in a slab: see cpu.summarize. Of a slab whose rows all stay, parse() has found it."""
    if values.summary is None:
        numbers = parser.numbers.begin(len(values))
        summarize_on_device(Rows(values.values, missing, len(values)), numbers, len(values))
        *_, values.summary = parser.numbers.read()
    return values.summary


@kernel(VALUES, MISSING, "int64", "int64", "int64")
def _integers(values, missing, count, shift, empty_value):
    row, column = cuda.grid(1), FIRST_DENSE + cuda.blockIdx.y
    if row < count:
        empty = rows.is_missing(missing[row], column)
        values[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)


def integers(values: Rows, missing, shift: int = 0, empty_value: int = 0) -> None:
    """Put what the record keeps in place of a slab's 13 integers; shift, empty_value: see rows.dense_value."""
    if len(values):
        grid = blocks_for(len(values)), FIRST_SPARSE - FIRST_DENSE
        launch(_integers, grid, values.values, missing, len(values), shift, empty_value)
