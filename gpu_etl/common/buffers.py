"""Memory that is used again: fresh pages cost more than much of what is computed on them."""

import math
from collections import deque
from collections.abc import Callable

import numpy as np


def host_bytes(size: int) -> np.ndarray:
    """New memory, uint8 [size]."""
    return np.empty(size, np.uint8)


class ScratchBuffer:
    """Memory of one array, whose next array takes its place; grows as needed, by allocate(bytes)."""

    def __init__(self, allocate: Callable[[int], np.ndarray] = host_bytes):
        self._allocate = allocate
        self._bytes = np.empty(0, np.uint8)
        self._wait: Callable[[], None] | None = None

    def hold(self, wait: Callable[[], None]) -> None:
        """Let the next empty() call wait() first: a device may still copy from or to the array given out."""
        self._wait = wait

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array, C-contiguous, its contents undefined. The one given out before it must not be used any more."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._bytes):
            self._bytes = self._allocate(size + size // 8)
        return self._bytes[:size].view(dtype).reshape(shape)


class Pool:
    """Byte buffers that threads hand to one another; new ones come from allocate(bytes)."""

    def __init__(self, allocate: Callable[[int], np.ndarray] = host_bytes):
        self._allocate = allocate
        self._free: dict[int, deque[np.ndarray]] = {}

    def take(self, size: int) -> np.ndarray:
        """uint8 [size]: a buffer that was given back, or a new one."""
        try:
            return self._free[size].pop()
        except (KeyError, IndexError):
            return self._allocate(size)

    def give(self, buffer: np.ndarray) -> None:
        """Give back what take() gave; nobody may use it any more, and no device may still copy from it."""
        self._free.setdefault(len(buffer), deque()).append(buffer)
