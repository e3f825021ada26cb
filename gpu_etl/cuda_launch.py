"""What every launch of a kernel needs, and how much memory the device gives."""

import numpy as np
from numba import cuda

from gpu_etl.errors import DeviceMemoryError

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


class Budget:
    """Device memory by use, held under `limit` bytes (0: none); peak: the most that was in use together."""

    def __init__(self):
        self.limit, self.peak = 0, 0
        self._parts: dict[str, int] = {}

    def take(self, name: str, size: int) -> None:
        """`name` is about to take `size` bytes in place of what it had. Raises DeviceMemoryError beyond the limit."""
        together = sum(self._parts.values()) - self._parts.get(name, 0) + size
        if self.limit and together > self.limit:
            raise DeviceMemoryError(
                f"--memory-limit {self.limit}: {name} take {size:,} bytes of device memory, {together:,} together with "
                "the rest; raise it, lower --slab-bytes, or use --device cpu"
            )
        self._parts[name] = size
        self.peak = max(self.peak, together)


budget = Budget()
