"""Read parts of a file: into memory of the caller's, whole or with an error.

No memory maps: where a mapped file is cut off or its disk fails, the system kills the process without a word.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from gpu_etl.common.errors import DataError


class DataFile:
    """A file open for reading at any place, from any thread."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self):
        return DataFile, (self.path,)

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill the C-contiguous array with the bytes from `offset` on.

        Raises DataError where the file has fewer, OSError with the file's name where it cannot be read.
        """
        memory, done = memoryview(array).cast("B"), 0
        while done < len(memory):
            try:
                got = os.preadv(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not got:
                raise DataError(
                    f"{self.path}: expected {len(memory):,} bytes at {offset:,}, found the end of the file at "
                    f"{offset + done:,}; it was cut off while in use"
                )
            done += got

    def read(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """An array of the bytes from `offset` on. Raises as read_into does."""
        array = np.empty(shape, dtype)
        if array.size:
            self.read_into(array, offset)
        return array
