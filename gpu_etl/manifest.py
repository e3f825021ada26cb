"""manifest.json: what a data set holds and everything that shaped it; read and write."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, FailFast, Field
from typing_extensions import TypedDict

from common import typed
from gpu_etl import formats
from gpu_etl.errors import DataError
from gpu_etl.schema import COLUMN_NAMES, DENSE, SPARSE, SPLITS, Preset

FILE_NAME = "manifest.json"
VOCABULARY = "vocabulary.npz"  # the id maps; see vocabulary.py
VERSION = 2
MOST_REASONS = 100
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sizes = Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=SPARSE, max_length=SPARSE)]


def _few(found: Any) -> Any:
    if isinstance(found, dict) and len(found) > MOST_REASONS:
        raise ValueError(f"expected at most {MOST_REASONS} keys, got {len(found):,}")
    return found


class FileEntry(TypedDict):
    """Of an output file."""

    __pydantic_config__ = typed.STRICT
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SourceEntry(TypedDict):
    """Of a day file; see Manifest."""

    __pydantic_config__ = typed.STRICT
    file: Annotated[str, Field(min_length=1)]
    bytes: Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    rows: Count
    dropped: Annotated[dict[str, Count], BeforeValidator(_few)]
    kept: Count
    clicks: Count
    missing: Annotated[list[Count], Field(min_length=DENSE + SPARSE, max_length=DENSE + SPARSE)]


class SettingsEntry(TypedDict):
    """What settings.Settings.shaping() records."""

    __pydantic_config__ = typed.STRICT
    preset: dict[str, Any]  # preset() looks at it
    days: Count
    fractions: Annotated[list[float], Field(max_length=3)]
    shuffle: bool
    seed: int
    format: Literal["records", "dist", "dle"]
    integers: str
    bad_rows: Literal["error", "skip"]


@dataclass(frozen=True)
class Manifest:
    """rows per split; table_sizes per category column; settings: the preset's rules, days, shuffle, seed;
    sources: of each day file name, bytes and CRC-32, rows read, dropped (by reason) and kept, and of those kept how
    many have label 1 ("clicks") and how many miss each of the 39 features ("missing"); files: bytes and SHA-256 of each
    output file.

    Holds no time and no path, so that the same input and settings make the same manifest. What it says must agree with
    itself (ValueError), so that no size in it is larger than the data set's files can bear out.
    """

    __pydantic_config__ = typed.STRICT
    rows: dict[Literal["train", "test", "val"], Count]
    table_sizes: Sizes
    settings: SettingsEntry
    sources: Annotated[list[SourceEntry], Field(min_length=1), FailFast()]
    files: Annotated[dict[str, FileEntry], BeforeValidator(_few)]
    version: int = VERSION

    def __post_init__(self):
        preset = self.preset()
        if lacking := set(SPLITS) - self.rows.keys():
            raise ValueError(f"rows: expected {', '.join(SPLITS)}, got no {' and no '.join(sorted(lacking))}")
        for source in self.sources:
            _check_source(source)
        kept, rows = sum(source["kept"] for source in self.sources), sum(self.rows.values())
        if kept != rows:
            raise ValueError(f"rows: {rows} in all splits, but {kept} were kept of all sources")
        # An id belongs to a value, and a value to a row.
        if (largest := max(self.table_sizes)) > max(1, preset.first_id + rows):
            raise ValueError(f"table_sizes: expected at most {preset.first_id + rows}, as {rows} rows show no more "
                             f"values, got {largest}")  # fmt: skip
        self._check_files()

    def _check_files(self) -> None:
        form = self.settings["format"]
        known = [*formats.expected_files(form), VOCABULARY]
        if unlisted := [name for name in known if name not in self.files]:
            raise ValueError(f"files: expected an entry for each file, found none for {', '.join(unlisted)}")
        if foreign := self.files.keys() - set(known):
            raise ValueError(f"files: {min(foreign)!r} is no file of a data set of the form {form!r}")
        for split in SPLITS:
            for part in formats.parts(form, split, self.table_sizes):
                expected, found = self.rows[split] * part.row_bytes, self.files[part.path]["bytes"]
                if found != expected:
                    raise ValueError(f"files: {part.path}: expected {expected} bytes for {self.rows[split]} rows, got "
                                     f"{found}")  # fmt: skip

    def preset(self) -> Preset:
        """The rules of the settings. Raises ValueError where they are none."""
        preset = typed.read(Preset, self.settings["preset"], "settings.preset", ValueError)
        try:
            preset.check()
        except DataError as error:  # it names flags
            raise ValueError(f"settings.preset: not the rules of a preset: {error}") from error
        return preset

    def write(self, folder: Path) -> None:
        """Write FILE_NAME into the folder, whole or not at all."""
        temporary, text = Path(folder) / (FILE_NAME + ".part"), json.dumps(asdict(self), indent=1, allow_nan=False)
        with open(temporary, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(Path(folder) / FILE_NAME)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Read FILE_NAME from the folder. Raises DataError where it is missing, damaged or of another version, and
        where it contradicts itself."""
        path = Path(folder) / FILE_NAME
        try:
            text = typed.read_file(path, _no_manifest)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; expected a data set made by `python -m gpu_etl encode`") from None
        return typed.read_json(Manifest, text, str(path), _no_manifest, VERSION)


def _check_source(source: SourceEntry) -> None:
    """Raise ValueError where the numbers of rows of a day file cannot be those of one file."""
    name, kept = source["file"], source["kept"]
    if kept + sum(source["dropped"].values()) != source["rows"]:
        raise ValueError(f"sources: {name}: {kept} rows kept and {sum(source['dropped'].values())} dropped do not make "
                         f"{source['rows']}")  # fmt: skip
    if max(source["clicks"], *source["missing"]) > kept:
        raise ValueError(f"sources: {name}: more clicks, or more missing values of a column, than the {kept} rows kept")


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
