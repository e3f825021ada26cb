"""The files of a split where several processes write them, each its own range of rows."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpu_etl.dataset.formats import parts

BLOCK_BYTES = 1 << 20


def allocate(form: str, folder: Path, split: str, table_sizes: Sequence[int], rows: int) -> None:
    """Make the files of a split, of `rows` rows."""
    for part in parts(form, split, table_sizes):
        path = Path(folder) / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(rows * part.row_bytes)


def write_at(form: str, folder: Path, split: str, table_sizes: Sequence[int], row: int, records: np.ndarray) -> None:
    """Write records int32 [n, 40] into the files of a split from row `row` on; allocate() made them."""
    for part in parts(form, split, table_sizes):
        with open(Path(folder) / part.path, "r+b", buffering=0) as file:
            file.seek(row * part.row_bytes)
            view = memoryview(part.convert(records)).cast("B")
            while view:
                view = view[file.write(view) :]


class Sums:
    """Checksums of a split's files, taken from front to back while others still write behind; for use in `with`."""

    def __init__(self, form: str, folder: Path, split: str, table_sizes: Sequence[int]):
        self._parts = parts(form, split, table_sizes)
        self._files = [open(Path(folder) / part.path, "rb", buffering=0) for part in self._parts]  # noqa: SIM115
        self._digests = [hashlib.sha256() for _ in self._parts]
        self._buffer = bytearray(BLOCK_BYTES)

    def take(self, rows: int) -> None:
        """Sum up the rows before `rows` that were not yet; all of them are written."""
        view = memoryview(self._buffer)
        for part, file, digest in zip(self._parts, self._files, self._digests, strict=True):
            left = rows * part.row_bytes - file.tell()
            while left > 0 and (count := file.readinto(view[:left])):
                digest.update(view[:count])
                left -= count

    def described(self) -> dict[str, dict]:
        """The manifest's entries of the files, which are on the disk then: path -> bytes and SHA-256."""
        for file in self._files:
            os.fsync(file.fileno())
        sums = zip(self._parts, self._files, self._digests, strict=True)
        return {part.path: {"bytes": file.tell(), "sha256": digest.hexdigest()} for part, file, digest in sums}

    def __enter__(self) -> "Sums":
        return self

    def __exit__(self, *_) -> None:
        for file in self._files:
            file.close()
