"""Parsed rows on disk between the passes."""

import os
from pathlib import Path

import numpy as np

from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMNS

VALUE_BYTES, MISSING_BYTES = COLUMNS * 4, 8


class Spill:
    """values uint32 [n, 40] and missing uint64 [n] in two files, 168 B a row.

    The first `rows` of an earlier run stay. Raises DataError where it left fewer.
    """

    def __init__(self, folder: Path, rows: int = 0):
        self._paths = folder / "values", folder / "missing"
        for path, size in zip(self._paths, (VALUE_BYTES, MISSING_BYTES), strict=True):
            path.touch()
            if path.stat().st_size < rows * size:
                raise DataError(f"{path}: shorter than its journal says; delete {folder} and start again")
            os.truncate(path, rows * size)
        self._files = [open(path, "ab") for path in self._paths]  # noqa: SIM115 - closed in close()

    def add(self, values: np.ndarray, missing: np.ndarray) -> None:
        """Append a slab. It is with the kernel on return."""
        values.tofile(self._files[0])
        missing.tofile(self._files[1])

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows begin to end."""
        values = np.fromfile(self._paths[0], np.uint32, (end - begin) * COLUMNS, offset=begin * VALUE_BYTES)
        missing = np.fromfile(self._paths[1], np.uint64, end - begin, offset=begin * MISSING_BYTES)
        return values.reshape(-1, COLUMNS), missing

    def close(self) -> None:
        """End writing; reading goes on."""
        for file in self._files:
            file.close()
