"""Open a data set: find its form, check its sizes, read blocks of rows from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_etl import formats, manifest
from gpu_etl.errors import DataError
from gpu_etl.formats import ANY_SIZES, FORMS, ID_DTYPES, Part
from gpu_etl.schema import (
    COLUMN_NAMES,
    COLUMNS,
    DENSE,
    FIRST_DENSE,
    FIRST_SPARSE,
    RECORD_BYTES,
    RECORD_DTYPE,
    SPARSE,
    SPLITS,
    split_file,
)

# What --dataset_type may say, and the form it means; "auto" takes any.
DATASET_TYPES = {"auto": None, "memmap": "records", "bin": "records", "dist": "dist", "dle": "dle"}
CHECK_ROWS = 1 << 18

Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


class RecordFile:
    """A file of 160-byte records, memory-mapped."""

    logged = False

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        if size % RECORD_BYTES:
            raise DataError(
                f"{path}: {size} bytes are no whole number of {RECORD_BYTES}-byte records "
                "(label, 13 integers, 26 ids; int32); the file is cut off, or of another format"
            )
        self.rows = size // RECORD_BYTES
        if not self.rows:
            raise DataError(f"{path}: the file is empty; expected {RECORD_BYTES}-byte records")
        self._records = np.memmap(path, RECORD_DTYPE, "r").reshape(-1, COLUMNS)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end as a read-only view, int32 [n, 40]."""
        return self._records[begin:end]

    def columns(self, begin: int, end: int) -> Columns:
        """Rows begin to end as dense float32 [n, 13], sparse int32 [n, 26], label float32 [n]; copies."""
        records = self.read(begin, end)
        return (
            records[:, FIRST_DENSE:FIRST_SPARSE].astype(np.float32, order="C"),
            records[:, FIRST_SPARSE:].astype(np.int32, order="C"),
            records[:, 0].astype(np.float32),
        )

    def check(self, table_sizes: Sequence[int], begin: int, end: int) -> None:
        """Check labels, integers and ids of rows begin to end. Raises DataError at the first wrong one."""
        manifest.check_ids(self.read(begin, end), list(table_sizes), str(self.path), begin)


class SplitFolder:
    """A split of a split form ("dist", "dle"; formats.py has their tables): a file per column or group, memory-mapped.

    Table sizes, where known, decide the dtype of each "dle" id file; without them its size does.
    """

    def __init__(self, path: Path, form: str, table_sizes: Sequence[int] | None = None):
        self.path = path
        self.logged = FORMS[form].logged
        parts = formats.parts(form, "train", table_sizes or ANY_SIZES)
        any_id = form == "dle" and table_sizes is None
        self.rows = self._size(parts[0]) // parts[0].row_bytes
        self._maps = [
            (part, self._map(part, ID_DTYPES if any_id and part.columns.start >= FIRST_SPARSE else [part.dtype]))
            for part in parts
        ]

    def _file(self, part: Part) -> Path:
        return self.path / Path(part.path).name

    def _size(self, part: Part) -> int:
        path = self._file(part)
        if not path.is_file() or not path.stat().st_size:
            raise DataError(f"{path}: no such file, or an empty one; the split form needs it")
        return path.stat().st_size

    def _map(self, part: Part, dtypes: Sequence[np.dtype]) -> np.ndarray:
        size, width = self._size(part), part.columns.stop - part.columns.start
        for dtype in dtypes:
            if size == self.rows * width * dtype.itemsize:
                return np.asarray(np.memmap(self._file(part), dtype, "r")).reshape(-1, width)
        expected = " or ".join(f"{self.rows * width * dtype.itemsize} bytes ({dtype})" for dtype in dtypes)
        raise DataError(
            f"{self._file(part)}: expected {self.rows} rows of {width}, as in label.bin, {expected}, got {size} bytes; "
            "the file is cut off, or of another data set"
        )

    def columns(self, begin: int, end: int) -> Columns:
        """Rows begin to end as dense float32 [n, 13] (logged if `logged`), sparse int32 [n, 26], label float32 [n]."""
        label, dense, *ids = (values[begin:end] for _, values in self._maps)
        sparse = np.empty((len(label), SPARSE), np.int32)
        for c, values in enumerate(ids):
            sparse[:, c] = values[:, 0]
        return dense.astype(np.float32), sparse, label[:, 0].astype(np.float32)

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
        half = int(np.finfo(np.float16).max)
        numbers = (-half, half) if self.logged else (0, 2**31 - 1)
        ranges = [(0, 1), *[numbers] * DENSE, *((0, size - 1) for size in table_sizes)]
        for part, values in self._maps:
            block, (low, high) = values[begin:end], ranges[part.columns.start]
            # Written so that a NaN is wrong; a label may be a float between 0 and 1.
            wrong = ~((block >= low) & (block <= high)) if part.columns.start else (block != 0) & (block != 1)
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise DataError(
                    f"{self._file(part)}: row {begin + row + 1}, column {COLUMN_NAMES[part.columns.start + column]}: "
                    f"expected {low} to {high}, got {block[row, column]}; the table sizes do not belong to this file, "
                    "or it is damaged"
                )


Source = RecordFile | SplitFolder


@dataclass(frozen=True)
class DataSet:
    """splits: "train", "test" and, if there is one, "val"; manifest: None for a data set made by another tool."""

    folder: Path
    splits: dict[str, Source]
    manifest: manifest.Manifest | None

    def check_ids(self, table_sizes: Sequence[int], progress=lambda rows: None) -> None:
        """Check every label and id of every split. Raises DataError naming file, row, column, value and limit."""
        for source in self.splits.values():
            for begin in range(0, source.rows, CHECK_ROWS):
                end = min(begin + CHECK_ROWS, source.rows)
                source.check(table_sizes, begin, end)
                progress(end - begin)

    def drop_from_page_cache(self) -> None:
        """Let the operating system forget the splits' contents, so that they are read from the disk again."""
        for source in self.splits.values():
            for path in source.path.iterdir() if source.path.is_dir() else [source.path]:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _find_splits(folder: Path) -> dict[str, Path]:
    """Paths of the splits by any of the field's names."""
    names = [[split_file(split)] for split in SPLITS], [[f"{split}_data.bin"] for split in SPLITS]
    for choices in (*names, [["train"], ["test"], ["val", "validation"]]):
        found = {
            split: folder / name
            for split, known in zip(SPLITS, choices, strict=True)
            for name in known
            if (folder / name).exists()
        }
        if "train" in found:
            return found
    raise DataError(
        f"{folder}: no data set; expected {split_file('train')} (or train_data.bin, or train/label.bin ...). "
        "Make one with `python -m gpu_etl encode DAY ... --out DIR`"
    )


def _detect(train: Path) -> str:
    """The form of a training split, told by its file sizes: a row's integers take 13 or 26 times the label's bytes."""
    if not train.is_dir():
        return "records"
    label, numerical = train / "label.bin", train / "numerical.bin"
    for path in (label, numerical):
        if not path.is_file():
            raise DataError(f"{path}: no such file, or an empty one; the split form needs it")
    label_bytes, bytes_ = label.stat().st_size, numerical.stat().st_size
    for form in ("dist", "dle"):
        label_part, dense_part, *_ = formats.parts(form, "train", ANY_SIZES)
        if bytes_ * label_part.row_bytes == label_bytes * dense_part.row_bytes:
            return form
    raise DataError(
        f"{numerical}: expected {DENSE} times (dist) or {2 * DENSE} times (dle) the {label_bytes} bytes of label.bin, "
        f"found {bytes_} bytes; one of the two is cut off, or of another format"
    )


def open_dataset(folder: Path, form: str = "memmap") -> DataSet:
    """Open the data set in `folder`. form, as in the MLPerf v0.7 flag: "memmap" and "bin" read records, "dist" split
    files; beside them "dle" reads DeepLearningExamples' split files, and "auto" whatever is there.

    Raises DataError where files are missing, of a wrong size, of another form, or unlike their manifest.
    """
    folder = Path(folder)
    paths = _find_splits(folder)
    found = _detect(paths["train"])
    if DATASET_TYPES[form] not in (None, found):
        known = {"records": "160-byte records (memmap, bin)"}.get(found, f"split files ({found})")
        raise DataError(f"{folder}: expected the form {form!r}, found {known}; change --dataset_type")
    if "test" not in paths:
        raise DataError(f"{folder}: found a training split, but no test split beside it")
    description = manifest.Manifest.read(folder) if (folder / manifest.FILE_NAME).exists() else None
    if description and not description.rows.get("val"):
        paths.pop("val", None)  # no rows to validate on: its files are empty, and cannot be mapped
    sizes = description.table_sizes if description else None
    splits = {
        split: RecordFile(path) if found == "records" else SplitFolder(path, found, sizes)
        for split, path in paths.items()
    }
    if description:
        for split, source in splits.items():
            if source.rows != description.rows[split]:
                raise DataError(
                    f"{source.path}: expected {description.rows[split]} rows by the manifest, found {source.rows}; "
                    "the file was changed or cut off: run `python -m gpu_etl verify`, or encode the days again"
                )
    return DataSet(folder, splits, description)
