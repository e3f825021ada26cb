"""manifest.json: what a data set holds and everything that shaped it; read and write."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from common import typed
from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMN_NAMES, DENSE, SPARSE, Preset

FILE_NAME = "manifest.json"
VERSION = 2
Count = Annotated[int, Field(ge=0)]
Sizes = Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=SPARSE, max_length=SPARSE)]


class FileEntry(TypedDict):
    """Of an output file."""

    __pydantic_config__ = typed.STRICT
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SourceEntry(TypedDict):
    """Of a day file; see Manifest."""

    __pydantic_config__ = typed.STRICT
    file: str
    bytes: Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    rows: Count
    dropped: dict[str, Count]
    kept: Count
    clicks: Count
    missing: Annotated[list[Count], Field(min_length=DENSE + SPARSE, max_length=DENSE + SPARSE)]


@dataclass(frozen=True)
class Manifest:
    """rows per split; table_sizes per category column; settings: the preset's rules, days, shuffle, seed;
    sources: of each day file name, bytes and CRC-32, rows read, dropped (by reason) and kept, and of those kept how
    many have label 1 ("clicks") and how many miss each of the 39 features ("missing"); files: bytes and SHA-256 of each
    output file.

    Holds no time and no path, so that the same input and settings make the same manifest.
    """

    __pydantic_config__ = typed.STRICT
    rows: dict[Literal["train", "test", "val"], Count]
    table_sizes: Sizes
    settings: dict[str, Any]
    sources: list[SourceEntry]
    files: dict[str, FileEntry]
    version: int = VERSION

    def preset(self) -> Preset:
        """The rules of the settings. Raises DataError where they are none."""
        found = self.settings.get("preset")
        known = {field.name for field in fields(Preset)}
        try:
            if not isinstance(found, dict) or found.keys() - known:
                raise TypeError(f"expected some of {', '.join(sorted(known))}")
            preset = Preset(**found)
            preset.check()
        except TypeError as error:
            raise DataError(f"{FILE_NAME}: settings.preset: not the rules of a preset ({error})") from error
        return preset

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
            text = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; expected a data set made by `python -m gpu_etl encode`") from None
        return typed.read_json(Manifest, text, str(path), _no_manifest, VERSION)


def _no_manifest(words: str) -> DataError:
    return DataError(f"{words}; not a manifest of version {VERSION}, or a damaged one: encode the days again")


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
