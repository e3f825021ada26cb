"""Files that work is appended to: written whole, cut back to what a journal tells of, few of them open at a time."""

import os
import resource
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpu_etl.errors import WorkDamagedError

MAX_OPEN = 256  # files that the process keeps open for appending
LIMIT_SHARE = 4  # of the descriptors that it may have, MAX_OPEN is no more than a quarter


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
