"""Splits on disk, in any form: blocks of rows from them, and checks of what they hold."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpu_etl.common.errors import DataError
from gpu_etl.dataset import formats, manifest
from gpu_etl.dataset.formats import ANY_SIZES, FORMS, ID_DTYPES, SplitFile
from gpu_etl.load.files import DataFile
from gpu_etl.load.unpack import ANY_ID
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, RECORD_BYTES, RECORD_DTYPE

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
SAMPLE_ROWS = 1 << 12
LARGEST_LOG = 23.0  # log(2^32) is 22.2
ONE_AS_FLOAT = 0x3F800000  # the bits of 1.0
FLOAT_BITS = 0x38000000, 0x42000000  # of 3e-5 and of 32: logarithms of integers lie between, integers hardly ever


class Source:
    """A split: `rows` rows; `logged`: its numbers are logarithms; `floats`: of packed rows, label and numbers are the
    bits of float32 (unpack.py); path: its file or folder; paths: all its files; ends: the largest id of each column
    that loaders let pass, uint32 [26]."""

    path: Path
    paths: list[Path]
    rows: int
    logged = False
    floats = True
    ends = ANY_ID

    def bound(self, table_sizes: Sequence[int] | None) -> None:
        """From now on, loaders refuse ids that have no row in tables of these sizes (None: any id will do)."""
        self.ends = ANY_ID if table_sizes is None else np.asarray(table_sizes, np.int64).astype(np.uint32) - 1

    def refuse(self, begin: int, end: int) -> None:
        """check() by what loaders let pass."""
        self.check((self.ends.astype(np.int64) + 1).tolist(), begin, end)

    def changed(self) -> DataError:
        """The error for a value that was wrong when it was read, and is right when it is looked at once more."""
        return DataError(f"{self.path}: a value that cannot be was read, and is not there any more: the file changes")

    def read_into(self, begin: int, end: int, block: np.ndarray) -> None:
        """Fill block, int32 [end - begin, 40], C-contiguous, with packed rows begin to end. From any thread.

        Raises DataError where a file has become shorter, OSError where it cannot be read.
        """
        raise NotImplementedError

    def columns(self, begin: int, end: int) -> Columns:
        """Rows begin to end as dense float32 [n, 13] (logged if `logged`), sparse int32 [n, 26], label float32 [n]."""
        block = np.empty((end - begin, COLUMNS), np.int32)
        self.read_into(begin, end, block)
        numbers = block.view(np.float32) if self.floats else block
        return (
            numbers[:, FIRST_DENSE:FIRST_SPARSE].astype(np.float32, order="C"),
            block[:, FIRST_SPARSE:].copy(),
            numbers[:, 0].astype(np.float32),
        )

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end as records, int32 [n, 40]. Integers are rounded: from a log in float16, to three digits."""
        dense, sparse, label = self.columns(begin, end)
        numbers = dense.astype(np.float64)
        records = np.empty((len(label), COLUMNS), RECORD_DTYPE)
        records[:, 0], records[:, FIRST_SPARSE:] = label, sparse
        records[:, FIRST_DENSE:FIRST_SPARSE] = np.rint(np.expm1(numbers) if self.logged else numbers).clip(
            0, np.iinfo(RECORD_DTYPE).max
        )
        return records

    def check(self, table_sizes: Sequence[int], begin: int, end: int) -> None:
        """Check labels, numbers and ids of rows begin to end. Raises DataError at the first wrong one of a file."""
        raise NotImplementedError

    def check_logs(self, path: Path) -> None:
        """Raise DataError where the first rows' numbers, which `path` holds, are not logged (or not) as they should."""
        dense = self.columns(0, min(self.rows, SAMPLE_ROWS))[0]
        wrong = np.isfinite(dense) & (dense > LARGEST_LOG if self.logged else dense != np.floor(dense))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            expected, looks = (
                (f"logarithms, at most {LARGEST_LOG:g}", "not logged") if self.logged else ("whole numbers", "logged")
            )
            raise DataError(
                f"{path}: row {row + 1}, column {COLUMN_NAMES[FIRST_DENSE + column]}: expected {expected}, got "
                f"{dense[row, column]:g}; these numbers are {looks}, unlike those of this form"
            )


class RecordFile(Source):
    """A file of 160-byte records."""

    floats = False

    def __init__(self, path: Path):
        self.path, self.paths = path, [path]
        size = path.stat().st_size
        if size % RECORD_BYTES:
            raise DataError(
                f"{path}: {size} bytes are no whole number of {RECORD_BYTES}-byte records "
                "(label, 13 integers, 26 ids; int32); the file is cut off, or of another format"
            )
        self.rows = size // RECORD_BYTES
        if not self.rows:
            raise DataError(f"{path}: the file is empty; expected {RECORD_BYTES}-byte records")
        self._file = DataFile(path)
        self._check_integers()

    def _check_integers(self) -> None:
        """Raise DataError where the first rows are the bits of floats, as DeepLearningExamples writes them."""
        rows = self.read(0, min(self.rows, SAMPLE_ROWS))
        dense = rows[:, FIRST_DENSE:FIRST_SPARSE]
        like_floats = (dense >= FLOAT_BITS[0]) & (dense < FLOAT_BITS[1])
        wrong = rows == ONE_AS_FLOAT
        wrong[:, FIRST_DENSE:] = False
        if like_floats.sum() > (dense != 0).sum() / 2:
            wrong[:, FIRST_DENSE:FIRST_SPARSE] = like_floats
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            value = rows[row, column]
            raise DataError(
                f"{self.path}: row {row + 1}, column {COLUMN_NAMES[column]}: expected whole numbers, got {value}, the "
                f"bits of the float {value.view(np.float32):g}; records with floats, as DeepLearningExamples writes "
                "them, are not read: split them by its split_dataset.py (--dataset_type dle), or encode the days again"
            )

    def read_into(self, begin: int, end: int, block: np.ndarray) -> None:
        """As Source.read_into."""
        self._file.read_into(block, begin * RECORD_BYTES)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end, int32 [n, 40]."""
        return self._file.read(RECORD_DTYPE, (end - begin, COLUMNS), begin * RECORD_BYTES)

    def check(self, table_sizes: Sequence[int], begin: int, end: int) -> None:
        """Check labels, integers and ids of rows begin to end. Raises DataError at the first wrong one."""
        manifest.check_ids(self.read(begin, end), list(table_sizes), str(self.path), begin)


class SplitFolder(Source):
    """A split of a split form ("dist", "dle"; formats.py has their tables): a file per column or group.

    Table sizes, where known, decide the dtype of each "dle" id file; without them its size does.
    """

    def __init__(self, path: Path, form: str, table_sizes: Sequence[int] | None = None):
        self.path = path
        self.logged = FORMS[form].logged
        parts = formats.parts(form, "train", table_sizes or ANY_SIZES)
        ids = ID_DTYPES if form == "dle" and table_sizes is None else None
        self.rows = self._size(parts[0]) // parts[0].row_bytes
        self._parts = [
            (part.columns, self._dtype(part, ids if ids and part.columns.start >= FIRST_SPARSE else [part.dtype]))
            for part in parts
        ]
        self.paths = [self._path(part) for part in parts]
        self._files = [DataFile(path) for path in self.paths]
        self.check_logs(self.paths[1])

    def _path(self, part: SplitFile) -> Path:
        return self.path / Path(part.path).name

    def _size(self, part: SplitFile) -> int:
        path = self._path(part)
        if not path.is_file() or not path.stat().st_size:
            raise DataError(f"{path}: no such file, or an empty one; the split form needs it")
        return path.stat().st_size

    def _dtype(self, part: SplitFile, dtypes: Sequence[np.dtype]) -> np.dtype:
        size, width = self._size(part), part.columns.stop - part.columns.start
        for dtype in dtypes:
            if size == self.rows * width * dtype.itemsize:
                return dtype
        expected = " or ".join(f"{self.rows * width * dtype.itemsize} bytes ({dtype})" for dtype in dtypes)
        raise DataError(
            f"{self._path(part)}: expected {self.rows} rows of {width}, as in label.bin, {expected}, got {size} bytes; "
            "the file is cut off, or of another data set"
        )

    def _values(self, begin: int, end: int):
        """Of each file: its DataFile, its columns, and its rows begin to end, [n, width]."""
        for file, (columns, dtype) in zip(self._files, self._parts, strict=True):
            width = columns.stop - columns.start
            yield file, columns, file.read(dtype, (end - begin, width), begin * width * dtype.itemsize)

    def read_into(self, begin: int, end: int, block: np.ndarray) -> None:
        """As Source.read_into."""
        numbers = block.view(np.float32)
        for _, columns, values in self._values(begin, end):
            (block if columns.start >= FIRST_SPARSE else numbers)[:, columns] = values

    def check(self, table_sizes: Sequence[int], begin: int, end: int) -> None:
        """Check labels, numbers and ids of rows begin to end. Raises DataError at the first wrong one of a file."""
        half = int(np.finfo(np.float16).max)
        numbers = (-half, half) if self.logged else (0, 2**31 - 1)
        ranges = [(0, 1), *[numbers] * DENSE, *((0, size - 1) for size in table_sizes)]
        for file, columns, block in self._values(begin, end):
            check_range(file.path, columns.start, block, ranges[columns.start], begin)


def check_range(path: Path, first_column: int, block: np.ndarray, limits: tuple[int, int], first_row: int) -> None:
    """Raise DataError where a value of block [n, width], the rows of `path` from first_row on, is beyond the limits."""
    low, high = limits
    # Written so that a NaN is wrong; a label may be a float between 0 and 1.
    wrong = ~((block >= low) & (block <= high)) if first_column else (block != 0) & (block != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"{path}: row {first_row + row + 1}, column {COLUMN_NAMES[first_column + column]}: expected {low} to "
            f"{high}, got {block[row, column]}; the table sizes do not belong to this file, or it is damaged"
        )
