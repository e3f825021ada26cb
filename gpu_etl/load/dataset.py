"""Open a data set: find its form, check its sizes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_etl.common.errors import DataError
from gpu_etl.dataset import formats, manifest
from gpu_etl.dataset.formats import ANY_SIZES
from gpu_etl.load import npy
from gpu_etl.load.sources import RecordFile, Source, SplitFolder
from gpu_etl.schema import DENSE, SPLITS, split_file

# What --dataset_type may say, and the form it means; "auto" takes any.
DATASET_TYPES = {
    "auto": None, "memmap": "records", "bin": "records", "dist": "dist", "dle": "dle", "torchrec": "torchrec"
}  # fmt: skip
CHECK_ROWS = 1 << 18


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

    def bound(self, table_sizes: Sequence[int] | None) -> None:
        """From now on, loaders refuse ids that have no row in tables of these sizes (None: any id will do)."""
        for source in self.splits.values():
            source.bound(table_sizes)

    def drop_from_page_cache(self) -> None:
        """Let the operating system forget the splits' contents, so that they are read from the disk again."""
        for source in self.splits.values():
            for path in source.paths:
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
        f"{folder}: no data set; expected {split_file('train')} (or train_data.bin, train/label.bin, day_0_labels.npy "
        "...). Make one with `python -m gpu_etl encode DAY ... --out DIR`"
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


def _expect(form: str, found: str, folder: Path) -> None:
    """Raise DataError where the form asked for is not the one found."""
    if DATASET_TYPES[form] not in (None, found):
        known = {"records": "160-byte records (memmap, bin)", "torchrec": "torchrec's .npy files"}
        raise DataError(
            f"{folder}: expected the form {form!r}, found {known.get(found, f'split files ({found})')}; "
            "change --dataset_type"
        )


def open_dataset(folder: Path, form: str = "memmap") -> DataSet:
    """Open the data set in `folder`. form, as in the MLPerf v0.7 flag: "memmap" and "bin" read records, "dist" split
    files; beside them "dle" reads DeepLearningExamples' split files, "torchrec" torchrec's .npy files, and "auto"
    whatever is there.

    Raises DataError where files are missing, of a wrong size, of another form, or unlike their manifest.
    """
    folder = Path(folder)
    if npy.find_days(folder):
        _expect(form, "torchrec", folder)
        return DataSet(folder, npy.open_days(folder), None)
    paths = _find_splits(folder)
    found = _detect(paths["train"])
    _expect(form, found, folder)
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
    found = DataSet(folder, splits, description)
    found.bound(sizes)
    return found
