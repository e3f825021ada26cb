"""Arrays in .npy and .npz files from outside: what a header says is looked at before anything is read.

np.load() believes a header: it allocates what that says, and inflates whatever a zip entry holds.
"""

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpu_etl.errors import DataError

# What NumPy's reader of headers, which parses Python, raises for bytes that are none.
_NO_HEADER = (
    ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError, AttributeError, tokenize.TokenError,
)  # fmt: skip

# What zipfile raises for bytes that are no archive, or an encrypted one; OSError: an offset before the file's begin.
_DAMAGED = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, ValueError, OverflowError, OSError,
    struct.error,
)  # fmt: skip


MOST_HEADER_BYTES = 1 << 12  # numpy's own for an array of two dimensions are 128
SHOWN = 120
READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # as 2, in UTF-8
}


def read_header(file: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored column after column, and dtype by the header that begins a .npy file; the file's
    place is behind it then. Raises DataError, naming `where`, where there is none, or one longer than that of an array
    of numbers can be."""
    start = file.read(12)
    version = tuple(start[6:8])
    if start[:6] != b"\x93NUMPY" or version not in READERS:
        raise DataError(f"{where}: expected a .npy file of version 1 to 3, got one that begins with {start[:8]!r}")
    length = int.from_bytes(start[8:10] if version == (1, 0) else start[8:12], "little")
    if length > MOST_HEADER_BYTES:
        raise DataError(f"{where}: expected a header of at most {MOST_HEADER_BYTES} bytes, got {length:,} by itself")
    file.seek(8)
    try:
        return READERS[version](file)
    except _NO_HEADER as error:
        words = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise DataError(f"{where}: expected the header of a .npy file: {words}") from error


class Reader:
    """An uncompressed .npz file, as np.savez writes it; for use in `with`. Raises DataError where it is something else,
    or damaged."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise DataError(f"{path}: not a .npz file, or a damaged one: {error}") from error
        total, size = sum(entry.compress_size for entry in self._zip.infolist()), path.stat().st_size
        if total > size:
            raise DataError(f"{path}: tells of {total:,} bytes of arrays in a file of {size:,}; not a .npz file")

    def read(self, name: str, dtype: type, dimensions: int) -> np.ndarray:
        """The array of that name. Raises DataError where there is none of this dtype and number of dimensions (0, 1);
        its size is checked before it is read."""
        where = f"{self._path}: {name}.npy"
        try:
            entry = self._zip.getinfo(f"{name}.npy")
        except KeyError:
            raise DataError(f"{where}: no such array; this is another kind of .npz file, or a damaged one") from None
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise DataError(
                f"{where}: is compressed, {entry.compress_size:,} bytes that open to {entry.file_size:,}; expected it "
                "uncompressed, as np.savez writes it"
            )
        try:
            with self._zip.open(entry) as file:
                shape, _, found = read_header(file, where)
                expected = np.dtype(dtype)
                if found != expected or len(shape) != dimensions:
                    raise DataError(f"{where}: expected {expected} with {dimensions} dimensions, got {found} {shape}")
                size = expected.itemsize * (shape[0] if shape else 1)
                if size != entry.file_size - file.tell():
                    raise DataError(f"{where}: expected {size:,} bytes by its header, got "
                                    f"{entry.file_size - file.tell():,}")  # fmt: skip
                return np.frombuffer(bytearray(file.read()), expected).reshape(shape)
        except DataError:
            raise
        except _DAMAGED as error:
            raise DataError(f"{where}: damaged ({error})") from error

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()
