"""Dictionary-coded rows on disk between the passes, and the dictionaries' keys.

A coded row is a record whose 26 ids are dictionary codes. Its number holds the place that it came from: the day file's
place among the inputs above DAY_SHIFT, the row's place among those kept of that day below. So a row's number does not
depend on how far other days were read.
"""

import os
import resource
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpu_etl.codecs import crc32
from gpu_etl.errors import WorkDamagedError
from gpu_etl.schema import COLUMNS, RECORD_BYTES, RECORD_DTYPE, SPARSE

DAY_SHIFT = 40
NUMBERED = np.dtype([("row", "<i8"), ("coded", RECORD_DTYPE, (COLUMNS,))])
KEY = np.dtype("<i8")  # column << 32 | value
KEYS = "keys"
MAX_OPEN = 256  # files that the process keeps open for appending
LIMIT_SHARE = 4  # of the descriptors that it may have, MAX_OPEN is no more than a quarter


def first_number(day: int) -> int:
    """Number of a day's first row."""
    return day << DAY_SHIFT


def words_of(numbered: np.ndarray) -> np.ndarray:
    """Rows NUMBERED [n], contiguous, as int32 [n, 42]: the number in the first two, the coded row behind it."""
    return numbered.view(RECORD_DTYPE).reshape(len(numbered), NUMBERED.itemsize // RECORD_DTYPE.itemsize)


def append(file: BinaryIO, array: np.ndarray) -> None:
    """Append a contiguous array to a file opened for it, unbuffered; it is with the kernel on return, or OSError was
    raised. All bytes of work files and splits that one process writes go through here.

    ndarray.tofile leaves the last bytes in a buffer of C, and says nothing where a full disk does not take them.
    """
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        view = view[file.write(view) :]


_descriptors_lock = threading.Lock()
_descriptors_taken = 0


def _take_descriptors(count: int) -> int:
    """How many of so many files may be kept open now: the tasks of a worker's threads share what the process has."""
    global _descriptors_taken
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN if limit == resource.RLIM_INFINITY else min(MAX_OPEN, limit // LIMIT_SHARE)
    with _descriptors_lock:
        taken = max(0, min(count, most - _descriptors_taken))
        _descriptors_taken += taken
    return taken


def _give_descriptors(count: int) -> None:
    global _descriptors_taken
    with _descriptors_lock:
        _descriptors_taken -= count


class Appended:
    """Files that exist, for append(), however many there are: as many as may be are kept open, each of the others is
    opened anew every time. Threads may append to different ones at a time."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        count = _take_descriptors(len(paths))
        self._give = weakref.finalize(self, _give_descriptors, count)
        self._files = [_open(path) for path in paths[:count]]

    def append(self, place: int, array: np.ndarray) -> None:
        """append() to the file at this place in the list."""
        if place < len(self._files):
            append(self._files[place], array)
            return
        with _open(self._paths[place]) as file:
            append(file, array)

    def close(self) -> None:
        """Close what is open; nothing is appended any more."""
        for file in self._files:
            file.close()
        self._give()


def _open(path: Path) -> BinaryIO:
    """Open a file that exists for append()."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), "ab", buffering=0)


def cut(path: Path, size: int) -> Path:
    """Leave the first `size` bytes of a file, for append(); returns its path. WorkDamagedError where it is shorter."""
    path.touch()
    found = path.stat().st_size
    if found < size:
        raise WorkDamagedError(
            f"{path}: expected {size} bytes to go on behind, found {found}: less than that run's journal says (did the "
            "machine stop?)"
        )
    os.truncate(path, size)
    return path


def open_cut(path: Path, size: int) -> BinaryIO:
    """Open what cut() left for append()."""
    return _open(cut(path, size))


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
