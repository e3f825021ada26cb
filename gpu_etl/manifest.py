"""manifest.json: what a data set holds and everything that shaped it; read and write."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMN_NAMES, DENSE

FILE_NAME = "manifest.json"
VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """rows per split; table_sizes per category column; settings: the preset's rules, days, shuffle, seed;
    sources: of each day file name, bytes and CRC-32, rows read, dropped (by reason) and kept, and of those kept how
    many have label 1 ("clicks") and how many miss each of the 39 features ("missing"); files: bytes and SHA-256 of each
    output file.

    Holds no time and no path, so that the same input and settings make the same manifest.
    """

    rows: dict[str, int]
    table_sizes: list[int]
    settings: dict
    sources: list[dict]
    files: dict[str, dict]
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write FILE_NAME into the folder, whole or not at all."""
        temporary = Path(folder) / (FILE_NAME + ".part")
        with open(temporary, "w") as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(Path(folder) / FILE_NAME)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Read FILE_NAME from the folder. Raises DataError where it is missing, damaged or of another version."""
        path = Path(folder) / FILE_NAME
        try:
            fields = json.loads(path.read_text())
            version = fields.get("version")
            if version != VERSION:
                raise DataError(f"{path}: expected version {VERSION}, got {version}; encode the days again")
            return Manifest(**fields)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; expected a data set made by `python -m gpu_etl encode`") from None
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest ({error}); encode the days again") from error


def describe_file(path: Path) -> dict:
    """The manifest's entry for an output file: bytes and SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_ids(records: np.ndarray, table_sizes: list[int], name: str, first_row: int = 0) -> None:
    """Check labels and id ranges of records int32 [n, 40]. Raises DataError naming row, column, value and limit."""
    if not len(records):
        return
    limits = np.array([2, *[2**31] * DENSE, *table_sizes], np.int64)
    wrong = (records < 0) | (records >= limits)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"{name}: row {first_row + row + 1}, column {COLUMN_NAMES[column]}: expected 0 to {limits[column] - 1}, "
            f"got {records[row, column]}; the table sizes do not belong to this file, or it is damaged"
        )
