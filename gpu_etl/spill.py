"""Parsed rows on disk between the passes."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMNS

VALUE_BYTES, MISSING_BYTES = COLUMNS * 4, 8


def append(file: BinaryIO, array: np.ndarray) -> None:
    """Append a contiguous array to a file opened for it; it is with the kernel on return, or OSError was raised.

    ndarray.tofile leaves the last bytes in a buffer of C, and says nothing where a full disk does not take them.
    """
    file.write(array)
    file.flush()


class Spill:
    """values uint32 [n, 40] and missing uint64 [n] in two files, 168 B a row.

    The first `rows` of an earlier run stay. Raises DataError where it left fewer.
    """

    def __init__(self, folder: Path, rows: int = 0):
        self._paths = folder / "values", folder / "missing"
        for path, size in zip(self._paths, (VALUE_BYTES, MISSING_BYTES), strict=True):
            path.touch()
            if path.stat().st_size < rows * size:
                raise DataError(f"{path}: shorter than its journal says, so that run cannot go on; start again")
            os.truncate(path, rows * size)
        self._files = [open(path, "ab") for path in self._paths]  # noqa: SIM115 - closed in close()

    def add(self, values: np.ndarray, missing: np.ndarray) -> None:
        """Append a slab. It is with the kernel on return."""
        for file, array in zip(self._files, (values, missing), strict=True):
            append(file, array)

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows begin to end."""
        values = np.fromfile(self._paths[0], np.uint32, (end - begin) * COLUMNS, offset=begin * VALUE_BYTES)
        missing = np.fromfile(self._paths[1], np.uint64, end - begin, offset=begin * MISSING_BYTES)
        return values.reshape(-1, COLUMNS), missing

    def close(self) -> None:
        """End writing; reading goes on."""
        for file in self._files:
            file.close()
