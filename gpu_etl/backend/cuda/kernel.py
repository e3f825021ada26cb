"""CUDA kernels whose argument types are declared: no launch specialises one by the type of a Python number.

Numba takes a Python int for an int64 where it fits, else for a uint64: a kernel compiled by its first arguments can be
another kernel with the next ones. Here every launch is checked against the one signature.
"""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import config, cuda

from gpu_etl.common.jit import CACHE_FOLDER

THREADS = 128  # a block

config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # some kernels are one block by design
if hasattr(cuda, "config"):  # numba-cuda has settings of its own beside Numba's
    cuda.config.CACHE_DIR = CACHE_FOLDER
    cuda.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


@dataclass(frozen=True)
class Argument:
    """A declared type: dtype, and for an array its dimensions (0: a number) and the order that it must be
    contiguous in."""

    dtype: np.dtype
    dimensions: int = 0
    order: str = ""

    @classmethod
    def read(cls, text: str) -> "Argument":
        """Of Numba's notation: "int64", "uint8[::1]" or "uint32[::1, :]"."""
        name, axes = re.fullmatch(r"(\w+)(?:\[(.*)\])?", text.strip()).groups()
        if axes is None:
            return cls(np.dtype(name))
        axes = [axis.strip() for axis in axes.split(",")]
        return cls(np.dtype(name), len(axes), "C" if axes[-1] == "::1" else "F")

    def wrong_with(self, value) -> str | None:
        """What is wrong with a value for it, or None."""
        if not self.dimensions:
            if not isinstance(value, int | np.integer | np.bool_):
                return f"expected a whole number, got {type(value).__name__}"
            limits = np.iinfo(self.dtype)
            return None if limits.min <= value <= limits.max else f"{value} is no {self.dtype}"
        if isinstance(value, np.ndarray):
            return "expected an array on the device, got one on the host"
        dtype, dimensions = getattr(value, "dtype", None), getattr(value, "ndim", None)
        if (dtype, dimensions) != (self.dtype, self.dimensions):
            return f"expected {self.dtype} with {self.dimensions} dimensions, got {dtype} with {dimensions}"
        contiguous = value.flags["C_CONTIGUOUS" if self.order == "C" else "F_CONTIGUOUS"]
        return None if contiguous or not value.size else f"expected an array contiguous in {self.order} order"


class Kernel:
    """A CUDA kernel, compiled at its first launch in this process; found on disk where an earlier one compiled it.

    py_func: the function; signature: the types of its arguments in Numba's notation.
    """

    def __init__(self, function: Callable, types: tuple[str, ...]):
        self.py_func, self.name = function, function.__name__
        self.signature = f"void({', '.join(types)})"
        self.arguments = tuple(map(Argument.read, types))
        self._compiled, self._lock = None, threading.Lock()

    def compiled(self):
        """Numba's dispatcher of it, which takes the declared types only."""
        with self._lock:
            if self._compiled is None:
                self._compiled = cuda.jit(self.signature, cache=not config.ENABLE_CUDASIM)(self.py_func)
        return self._compiled

    def launch(self, blocks: int | tuple[int, int], stream, *arguments) -> None:
        """Start it on a stream in so many blocks of THREADS. Raises TypeError where an argument is not as declared."""
        if len(arguments) != len(self.arguments):
            raise TypeError(f"{self.name}: expected {len(self.arguments)} arguments, got {len(arguments)}")
        for place, (declared, value) in enumerate(zip(self.arguments, arguments, strict=True)):
            if wrong := declared.wrong_with(value):
                raise TypeError(f"{self.name}, argument {place}: {wrong}")
        if config.ENABLE_CUDASIM:  # it would hand on Python's numbers
            pairs = zip(self.arguments, arguments, strict=True)
            arguments = [value if a.dimensions else a.dtype.type(value) for a, value in pairs]
        self.compiled()[blocks, THREADS, stream](*arguments)


def kernel(*types: str) -> Callable[[Callable], Kernel]:
    """Declare a function to be a kernel with arguments of these types."""
    return lambda function: Kernel(function, types)


def blocks_for(threads: int) -> int:
    """Blocks of THREADS that hold so many threads; at least 1."""
    return max(1, -(-threads // THREADS))
