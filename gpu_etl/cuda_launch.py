"""What every launch of a kernel needs (leaf)."""

import numpy as np
from numba import cuda

THREADS = 128  # a block


def blocks_for(threads: int) -> int:
    """Blocks of THREADS that hold so many threads; at least 1."""
    return max(1, -(-threads // THREADS))


def upload_array(array: np.ndarray):
    """The array on the device."""
    return cuda.to_device(array)


def download(array) -> np.ndarray:
    """The device array on the host, contiguous."""
    return np.ascontiguousarray(array.copy_to_host())
