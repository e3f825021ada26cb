"""The slab functions of cpu.py on a GPU: Numba kernels that call the same scalar functions of rows.py.

A slab's values, uint32 [n, 40] column-major, and missing, uint64 [n], stay on the device between the functions; only
faults, labels, counts and finished rows come back. Everything is integers, so the results are the CPU's, to the bit.
"""

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
from numba import config, cuda

from gpu_etl import cuda_direct, rows
from gpu_etl.cpu import set_threads
from gpu_etl.cuda_dictionary import Dictionaries
from gpu_etl.cuda_direct import direct_slabs
from gpu_etl.cuda_encode import Finisher, group, rows_of, shuffled
from gpu_etl.cuda_launch import blocks_for, budget, download, empty, host_bytes, launch, upload_array
from gpu_etl.cuda_parquet import parquet_slabs
from gpu_etl.cuda_rows import find_rows, parse
from gpu_etl.errors import DataError
from gpu_etl.extract import Slab
from gpu_etl.rows import INT32_MAX
from gpu_etl.schema import COLUMNS, FIRST_DENSE, FIRST_SPARSE
from gpu_etl.tally import Summary

__all__ = [
    "Dictionaries", "Finisher", "enter_thread", "find_rows", "group", "host_bytes", "integers", "keep_rows", "labels",
    "parse", "peak_device_bytes", "readers", "require_gpu", "rows_of", "set_memory_limit", "set_threads",
    "shuffled", "summarize", "upload",
]  # fmt: skip

SLAB_BYTES = 64 << 20  # of text: some milliseconds of copying, so that starting kernels costs little beside it
ENCODE_ROWS = 1 << 18
CORES_PER_READER = 3  # the host only reads and writes
SUMMARY_BLOCKS = 64  # a column


def require_gpu() -> None:
    """Raise DataError, with what to do, where Numba finds no GPU that it can use."""
    try:
        cuda.get_current_device()
    except Exception as error:  # Numba raises many kinds, down to one per missing library
        raise DataError(
            f"--device cuda: Numba finds no usable GPU ({str(error).strip() or type(error).__name__}); check "
            "`nvidia-smi` (driver for CUDA 13, or `pip install numba-cuda[cu12]` for 12), or --device cpu"
        ) from error
    if not config.ENABLE_CUDASIM and not importlib.util.find_spec("cupy"):
        raise DataError("--device cuda: CuPy is missing; `pip install -r requirements-gpu.txt`, or --device cpu")


def enter_thread() -> None:
    """What every thread begins with that calls functions here or touches, frees or waits for their memory: make the
    device's context current, without which the driver refuses it."""
    cuda.current_context()


def set_memory_limit(limit: int) -> None:
    """Hold the device memory that the functions here take under so many bytes, 0: no limit."""
    budget.limit = limit


def readers() -> dict[str, Callable[..., Iterator[Slab]]]:
    """Ways of its own to read a kind of day file: Parquet, and plain text where storage can be read directly."""
    return {"parquet": parquet_slabs} | ({"text": direct_slabs} if cuda_direct.is_there() else {})


def peak_device_bytes() -> int:
    """The most device memory that was in use."""
    return budget.peak


def upload(values: np.ndarray, missing: np.ndarray):
    """Values and missing of a slab that another parser made, on the device."""
    return upload_array(np.asfortranarray(values)), upload_array(missing)


def labels(values) -> np.ndarray:
    """The labels of a parsed slab, uint32 [n], on the host."""
    return download(values[:, 0]) if len(values) else np.empty(0, np.uint32)


@cuda.jit
def _keep(values, missing, kept, new_values, new_missing):
    i, column = cuda.grid(1), cuda.blockIdx.y
    if i < len(kept):
        new_values[i, column] = values[kept[i], column]
        if column == 0:
            new_missing[i] = missing[kept[i]]


def keep_rows(values, missing, keep: np.ndarray):
    """Values and missing of the rows where keep, bool [n] on the host, is true."""
    kept = np.flatnonzero(keep)
    new_values, new_missing = empty((len(kept), COLUMNS), np.uint32, "F"), empty(len(kept), np.uint64)
    if len(kept):
        grid = blocks_for(len(kept)), COLUMNS
        launch(_keep, grid, values, missing, upload_array(kept), new_values, new_missing)
    return new_values, new_missing


@cuda.jit
def _summarize(values, missing, found):
    """Block (b, c) looks at a part of column c: found[c] += empty ones; found[COLUMNS] += labels; found[COLUMNS + 1]:
    the smallest integer. One or two atomics a thread."""
    column, empty_ones, clicks, least = cuda.blockIdx.y, 0, 0, np.int64(INT32_MAX)
    for row in range(cuda.grid(1), len(missing), cuda.gridDim.x * cuda.blockDim.x):
        is_empty = rows.is_missing(missing[row], column)
        empty_ones += is_empty
        if column == 0:
            clicks += np.int64(values[row, 0])
        elif column < FIRST_SPARSE:
            least = min(least, rows.signed32(np.int64(values[row, column])))
    if empty_ones:
        cuda.atomic.add(found, column, empty_ones)
    if clicks:
        cuda.atomic.add(found, COLUMNS, clicks)
    if least < found[COLUMNS + 1]:
        cuda.atomic.min(found, COLUMNS + 1, least)


def summarize(values, missing) -> Summary:
    """What there is in a slab: see cpu.summarize."""
    start = np.zeros(COLUMNS + 2, np.int64)
    start[-1] = INT32_MAX
    found = upload_array(start)
    if len(missing):
        launch(_summarize, (min(SUMMARY_BLOCKS, blocks_for(len(missing))), COLUMNS), values, missing, found)
    *empty_ones, clicks, smallest = download(found).tolist()
    return Summary(clicks, empty_ones, smallest)


@cuda.jit
def _integers(values, missing, shift, empty_value):
    row, column = cuda.grid(1), FIRST_DENSE + cuda.blockIdx.y
    if row < len(values):
        empty = rows.is_missing(missing[row], column)
        values[row, column] = rows.dense_value(np.int64(values[row, column]), empty, shift, empty_value)


def integers(values, missing, shift: int = 0, empty_value: int = 0) -> None:
    """Put what the record keeps in place of a slab's 13 integers; shift, empty_value: see rows.dense_value."""
    if len(values):
        grid = blocks_for(len(values)), FIRST_SPARSE - FIRST_DENSE
        launch(_integers, grid, values, missing, shift, empty_value)
