"""Memory that is used again (leaf): fresh pages cost more than much of what is computed on them."""

import math
from collections import deque

import numpy as np


class Reused:
    """Memory of one array, whose next array takes its place; grows as needed."""

    def __init__(self):
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array, C-contiguous, its contents undefined. The one given out before it must not be used any more."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._bytes):
            self._bytes = np.empty(size + size // 8, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


class Pool:
    """Byte buffers that threads hand to one another."""

    def __init__(self):
        self._free: deque[np.ndarray] = deque()

    def take(self, size: int) -> np.ndarray:
        """uint8 [size]: a buffer that was given back, or a new one."""
        try:
            buffer = self._free.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return buffer if len(buffer) == size else np.empty(size, np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Give back what take() gave; nobody may use it any more."""
        self._free.append(buffer)
