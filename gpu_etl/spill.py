"""Dictionary-coded rows on disk between the passes, and the dictionaries' keys.

A coded row is a record whose 26 ids are dictionary codes.
"""

from pathlib import Path

import numpy as np

from gpu_etl.append import Appended, cut
from gpu_etl.codecs import crc32
from gpu_etl.schema import COLUMNS, RECORD_BYTES, RECORD_DTYPE, SPARSE

KEY = np.dtype("<i8")  # column << 32 | value
KEYS = "keys"


class Spill:
    """Coded rows, 160 B each, in a file a day; and the keys of the dictionaries.

    kept: rows of each day that an earlier run has surely put there, 0 for days whose rows go elsewhere; keys: how many
    keys. keys_crc: CRC-32 of their file. Raises WorkDamagedError where it left fewer.
    """

    def __init__(self, folder: Path, kept: list[int], keys: int):
        self.folder = folder
        rows = [cut(folder / f"rows_{day}", rows * RECORD_BYTES) for day, rows in enumerate(kept)]
        self._files = Appended([cut(folder / KEYS, keys * KEY.itemsize), *rows])
        self.keys_crc = crc32(np.fromfile(folder / KEYS, np.uint8))

    def add(self, day: int, coded: np.ndarray) -> None:
        """Append rows int32 [n, 40], C-contiguous, of a day. They are with the kernel on return."""
        self._files.append(1 + day, coded)

    def read(self, day: int, begin: int, end: int) -> np.ndarray:
        """Rows begin to end of a day, int32 [n, 40]."""
        return self.rows_in(self.folder, day, begin, end)

    @staticmethod
    def rows_in(folder: Path, day: int, begin: int, end: int) -> np.ndarray:
        """The same of a spill in `folder` that is not open."""
        count = (end - begin) * COLUMNS
        path = folder / f"rows_{day}"
        return np.fromfile(path, RECORD_DTYPE, count, offset=begin * RECORD_BYTES).reshape(-1, COLUMNS)

    def add_keys(self, keys: list[np.ndarray]) -> int:
        """Append 26 arrays of new keys; returns how many they were together."""
        columns = np.repeat(np.arange(SPARSE, dtype=KEY), [len(column) for column in keys])
        stored = columns << 32 | np.concatenate(keys)
        self._files.append(0, stored)
        self.keys_crc = crc32(stored, self.keys_crc)
        return len(columns)

    def keys(self) -> list[np.ndarray]:
        """26 arrays of keys, uint32, in the order in which they were added."""
        return self.keys_in(self.folder)

    @staticmethod
    def keys_in(folder: Path) -> list[np.ndarray]:
        """The same of a spill in `folder` that is not open."""
        keys = np.fromfile(folder / KEYS, KEY)
        return [(keys[keys >> 32 == column] & 0xFFFFFFFF).astype(np.uint32) for column in range(SPARSE)]

    def close(self) -> None:
        """End writing; reading goes on."""
        self._files.close()
