"""The form of torchrec's datasets/criteo.py: per day day_D_{dense,sparse,labels}.npy, the last day tests."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpu_etl.errors import DataError
from gpu_etl.load.files import DataFile
from gpu_etl.load.sources import Source, check_range
from gpu_etl.npz import read_header
from gpu_etl.schema import DENSE, FIRST_DENSE, FIRST_SPARSE, SPARSE

# Part -> the columns it holds, its width, dtypes it may have, the endings of its name.
PARTS = {
    "labels": (slice(0, 1), 1, ("i", "f"), ("labels",)),
    "dense": (slice(FIRST_DENSE, FIRST_SPARSE), DENSE, ("f",), ("dense",)),
    "sparse": (slice(FIRST_SPARSE, FIRST_SPARSE + SPARSE), SPARSE, ("i",), ("sparse", "sparse_contig_freq")),
}
DAY = re.compile(r"day_(\d+)_labels\.npy")


class _Array:
    """A .npy file of rows, its header checked."""

    def __init__(self, path: Path, width: int, kinds: Sequence[str]):
        with open(path, "rb") as file:
            shape, fortran, self.dtype = read_header(file, str(path))
            self._start = file.tell()
        self.rows, self._width = shape[0] if shape else -1, width
        fits = shape in ((self.rows, width), (self.rows,) * (width == 1)) and {*map(type, shape)} == {int}
        if not fits or self.rows < 0 or fortran or self.dtype.kind not in kinds:
            raise DataError(
                f"{path}: expected rows of {width}, row after row, dtype {' or '.join(kinds)}, got shape {shape}, "
                f"{self.dtype}{', column after column' * fortran}"
            )
        expected, size = self._start + self.rows * width * self.dtype.itemsize, path.stat().st_size
        if size != expected:
            what = "the file is cut off" if size < expected else "there is more behind its rows"
            raise DataError(f"{path}: expected {expected:,} bytes by its header, found {size:,}; {what}")
        self._file = DataFile(path)

    @property
    def path(self) -> Path:
        return self._file.path

    def read(self, begin: int, end: int) -> np.ndarray:
        offset = self._start + begin * self._width * self.dtype.itemsize
        return self._file.read(self.dtype, (end - begin, self._width), offset)


class NpyDays(Source):
    """Rows of some days, one day behind the other, or of a part of one: rows first to last of them.

    Dense is logged already: log(x - min + 2) in torchrec's own preprocessing.
    """

    logged = True

    def __init__(self, folder: Path, days: Sequence[int], first: int = 0, last: int | None = None):
        self.path, self._days = folder, [_open_day(folder, day) for day in days]
        self._ends = np.cumsum([arrays[0].rows for arrays in self._days])
        self._first = first
        self.rows = (self._ends[-1] if last is None else last) - first
        self.rows = int(self.rows)
        self.paths = [array.path for arrays in self._days for array in arrays]
        if not self.rows:
            raise DataError(f"{self.paths[0]}: no rows in it for this split")
        self.check_logs(self._days[0][1].path)

    def _stretches(self, begin: int, end: int) -> Iterator[tuple[list[_Array], int, int]]:
        """The days' arrays, and rows of theirs, that make up rows begin to end."""
        begin, end = begin + self._first, end + self._first
        for arrays, day_end in zip(self._days, self._ends.tolist(), strict=True):
            day_begin = day_end - arrays[0].rows
            low, high = max(begin, day_begin), min(end, day_end)
            if low < high:
                yield arrays, low - day_begin, high - day_begin

    def read_into(self, begin: int, end: int, block: np.ndarray) -> None:
        """As Source.read_into."""
        done = 0
        for arrays, low, high in self._stretches(begin, end):
            rows = block[done : done + high - low]
            for array, (columns, *_) in zip(arrays, PARTS.values(), strict=True):
                (rows if columns.start >= FIRST_SPARSE else rows.view(np.float32))[:, columns] = array.read(low, high)
            done += high - low

    def check(self, table_sizes: Sequence[int], begin: int, end: int) -> None:
        """Check labels, numbers and ids of rows begin to end. Raises DataError at the first wrong one of a file."""
        largest = float(np.finfo(np.float32).max)
        for (label, dense, sparse), low, high in self._stretches(begin, end):
            check_range(label.path, 0, label.read(low, high), (0, 1), low)
            check_range(dense.path, FIRST_DENSE, dense.read(low, high), (-largest, largest), low)
            ids = sparse.read(low, high)
            for c, size in enumerate(table_sizes):
                check_range(sparse.path, FIRST_SPARSE + c, ids[:, c : c + 1], (0, size - 1), low)


def _open_day(folder: Path, day: int) -> list[_Array]:
    arrays = []
    for _, width, kinds, endings in PARTS.values():
        names = [folder / f"day_{day}_{ending}.npy" for ending in endings]
        found = next((path for path in names if path.is_file()), None)
        if not found:
            raise DataError(f"{names[0]}: no such file; torchrec's form needs it")
        arrays.append(_Array(found, width, kinds))
    if len({array.rows for array in arrays}) > 1:
        counts = ", ".join(f"{array.path.name} {array.rows}" for array in arrays)
        raise DataError(f"{folder}: day {day}: expected files of equally many rows, got {counts}")
    return arrays


def find_days(folder: Path) -> list[int]:
    """Numbers of the days whose labels lie in the folder, in order."""
    return sorted(int(found[1]) for path in folder.glob("day_*_labels.npy") if (found := DAY.fullmatch(path.name)))


def open_days(folder: Path) -> dict[str, NpyDays]:
    """The splits: all days but the last train; of the last, the first half (rounded up) validates, the rest tests.

    Raises DataError where there is but one day, or its files are not as they should be.
    """
    *train, last = find_days(folder)
    if not train:
        raise DataError(f"{folder}: expected at least two days, all but the last to train on; found day {last} alone")
    rows = _open_day(folder, last)[0].rows
    half = -(-rows // 2)
    return {"train": NpyDays(folder, train), "val": NpyDays(folder, [last], 0, half),
            "test": NpyDays(folder, [last], half, rows)}  # fmt: skip
