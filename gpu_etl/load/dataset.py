"""Open a data set: find its form, check its sizes, read blocks of records from it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpu_etl import manifest
from gpu_etl.errors import DataError
from gpu_etl.schema import (
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

FORMS = ("bin", "memmap", "dist")
CHECK_ROWS = 1 << 18


class RecordFile:
    """A file of 160-byte records, memory-mapped."""

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


class SplitFolder:
    """The split form of the MLPerf v0.7 code ("dist"): label.bin float32, numerical.bin float32 [n, 13] (not logged),
    cat_0.bin ... cat_25.bin int32, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path
        self._label = self._map("label.bin", np.float32, 1)
        self.rows = len(self._label)
        self._dense = self._map("numerical.bin", np.float32, DENSE)
        self._sparse = [self._map(f"cat_{c}.bin", np.int32, 1) for c in range(SPARSE)]

    def _map(self, name: str, dtype: type, width: int) -> np.ndarray:
        path = self.path / name
        if not path.is_file() or not path.stat().st_size:
            raise DataError(f"{path}: no such file, or an empty one; the split form needs it")
        values = np.memmap(path, dtype, "r")
        if name != "label.bin" and len(values) != self.rows * width:
            raise DataError(f"{path}: expected {self.rows} rows of {width}, as in label.bin, got {len(values)} values")
        return values.reshape(-1, width)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end as records, int32 [n, 40]."""
        block = np.empty((end - begin, COLUMNS), RECORD_DTYPE)
        block[:, :FIRST_DENSE] = self._label[begin:end]
        block[:, FIRST_DENSE:FIRST_SPARSE] = self._dense[begin:end]
        for c, values in enumerate(self._sparse):
            block[:, FIRST_SPARSE + c] = values[begin:end, 0]
        return block


Source = RecordFile | SplitFolder


@dataclass(frozen=True)
class DataSet:
    """splits: "train", "test" and, if there is one, "val"; manifest: None for a data set made by another tool."""

    folder: Path
    splits: dict[str, Source]
    manifest: manifest.Manifest | None

    def check_ids(self, table_sizes: tuple[int, ...], progress=lambda rows: None) -> None:
        """Check every label and id of every split. Raises DataError naming file, row, column, value and limit."""
        for source in self.splits.values():
            for begin in range(0, source.rows, CHECK_ROWS):
                block = source.read(begin, min(begin + CHECK_ROWS, source.rows))
                manifest.check_ids(block, list(table_sizes), str(source.path), begin)
                progress(len(block))


def _find_splits(folder: Path) -> dict[str, Path]:
    """Paths of the splits by any of the field's names."""
    for names in ({s: split_file(s) for s in SPLITS}, {s: f"{s}_data.bin" for s in SPLITS}, {s: s for s in SPLITS}):
        found = {split: folder / name for split, name in names.items() if (folder / name).exists()}
        if "train" in found:
            return found
    raise DataError(
        f"{folder}: no data set; expected {split_file('train')} (or train_data.bin, or train/label.bin ...). "
        "Make one with `python -m gpu_etl encode DAY ... --out DIR`"
    )


def open_dataset(folder: Path, form: str = "memmap") -> DataSet:
    """Open the data set in `folder`; form is the MLPerf v0.7 flag: "memmap" and "bin" read records, "dist" split files.

    Raises DataError where files are missing, of a wrong size, of another form, or unlike their manifest.
    """
    folder = Path(folder)
    paths = _find_splits(folder)
    if paths["train"].is_dir() != (form == "dist"):
        found = "split files (dist)" if paths["train"].is_dir() else "160-byte records (memmap, bin)"
        raise DataError(f"{folder}: expected the form {form!r}, found {found}; change --dataset_type")
    if "test" not in paths:
        raise DataError(f"{folder}: found a training split, but no test split beside it")
    splits = {split: (SplitFolder if form == "dist" else RecordFile)(path) for split, path in paths.items()}
    description = manifest.Manifest.read(folder) if (folder / manifest.FILE_NAME).exists() else None
    if description:
        for split, source in splits.items():
            if source.rows != description.rows[split]:
                raise DataError(
                    f"{source.path}: expected {description.rows[split]} rows by the manifest, found {source.rows}; "
                    "the file was changed or cut off: run `python -m gpu_etl verify`, or encode the days again"
                )
    return DataSet(folder, splits, description)
