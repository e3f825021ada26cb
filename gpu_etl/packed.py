"""Packed text days (gzip, zstd) -> slabs of whole rows: one reader a file, as what is packed has no middle."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu_etl import codecs
from gpu_etl.errors import DataError
from gpu_etl.memory import Pool
from gpu_etl.source import ChecksummedFile, Source, fill, skip_bytes
from gpu_etl.text import BLANK_BYTES, NEWLINE, TextSlab, blank_bytes, too_long

TAIL_BYTES = 1 << 16
ZSTD_PIECE = 1 << 12


class _ZstdFile(io.RawIOBase):
    """The text of a zstd file of one or more frames. Raises one of codecs.ERRORS where it is damaged or cut off.

    zstandard's own stream_reader takes a cut-off frame for the end of the file. Decompression objects do tell, but give
    all text of a piece at once, up to 32768 times its bytes: the pieces have to be small.
    """

    def __init__(self, stored: io.BufferedReader):
        self._stored = stored
        self._piece = b""
        self._frame = None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._piece = self._piece or self._stored.read(ZSTD_PIECE)
            if not self._piece:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._inflate()
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _inflate(self) -> None:
        if self._frame is None:
            self._frame = codecs.zstd_frame()
        self._text = memoryview(self._frame.decompress(self._piece))
        self._piece = b""
        if self._frame.eof:
            self._piece, self._frame = self._frame.unused_data, None


def _last_newline(buffer: np.ndarray) -> int:
    """Position of the last newline in buffer uint8 [bytes], -1 if there is none."""
    for end in range(len(buffer), 0, -TAIL_BYTES):
        begin = max(0, end - TAIL_BYTES)
        found = np.flatnonzero(buffer[begin:end] == NEWLINE)
        if len(found):
            return begin + int(found[-1])
    return -1


def _cut(stream, path: Path, day: int, slab_bytes: int, end: int, pool: Pool) -> Iterator[TextSlab]:
    """Slabs of at most `slab_bytes`, each but the last ending with a newline; the rest of a row moves to the next, and
    so do blank lines, which are no rows at the end of the day.

    `end`: how many bytes of text came before.
    """
    rest = np.empty(0, np.uint8)
    while True:
        buffer = pool.take(slab_bytes)
        buffer[: len(rest)] = rest
        filled = fill(stream, buffer, len(rest))
        last = filled - blank_bytes(buffer[max(0, filled - BLANK_BYTES) : filled].tobytes())
        if filled < slab_bytes:
            if last:
                yield TextSlab(day, end + last, buffer[:last], pool)
            return
        last = min(last, _last_newline(buffer) + 1)
        if not last:
            raise too_long(path, slab_bytes)
        rest = buffer[last:].copy()
        end += last
        yield TextSlab(day, end, buffer[:last], pool)


def read_packed(source: Source, day: int, slab_bytes: int, skip: int, kind: str, pool: Pool) -> Iterator[TextSlab]:
    """Slabs of a day of packed text; kind: "gzip" or "zstd"."""
    stream = io.BufferedReader(ChecksummedFile(source), 1 << 20)
    try:
        text = codecs.read_gzip(stream) if kind == "gzip" else _ZstdFile(stream)
        skip_bytes(text, skip)
        yield from _cut(text, source.path, day, slab_bytes, skip, pool)
    except OverflowError as error:  # of isal
        raise DataError(
            f"{source.path}: expected a gzip header of some bytes, found one of more than 512 KiB (name, comment or "
            "extra field); pack it anew: `gunzip -c FILE | gzip -n > NEW`"
        ) from error
    except codecs.ERRORS as error:
        raise DataError(f"{source.path}: damaged or cut-off {kind} file ({error}); fetch it again") from error
    finally:
        stream.close()
