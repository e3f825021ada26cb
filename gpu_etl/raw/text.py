"""Plain text days -> slabs of whole rows, several threads side by side in one file.

The file is read in equal shares. A share's slab has the rows whose first byte lies in it, so no share waits for what
was found in another; a row that goes on behind its share is read to its end, once more by the share that it ends in.
Slabs come in the order of the file, whoever read them first.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from gpu_etl.common import crc
from gpu_etl.common.buffers import Pool, ScratchBuffer
from gpu_etl.common.codecs import crc32
from gpu_etl.common.errors import DataError
from gpu_etl.common.threads import in_order, nothing
from gpu_etl.raw.source import Source
from gpu_etl.rows import faults

NEWLINE = 10
PIECE_BYTES = 1 << 18  # read at a time, and summed up while in the cache
TAIL_BYTES = 1 << 16  # room of a slab behind its share, for the end of the last row
STEP_BYTES = 1 << 12
BLANK_BYTES = 1 << 9  # at the end of a day that may be blank lines, which are no rows then


@dataclass
class TextSlab:
    """A slab of text, uint8 [bytes]; its memory belongs to the pool. labelled: see faults.describe."""

    labelled = True

    day: int
    end: int
    text: np.ndarray
    pool: Pool
    part: int = 0
    _ends: np.ndarray | None = field(default=None, init=False)
    _left: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8), init=False)

    def prepare(self, kernels: ModuleType) -> None:
        """Find the rows."""
        self._ends = kernels.find_rows(self.text)

    def parse(self, kernels: ModuleType, memory: ScratchBuffer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See source.Slab."""
        found = kernels.parse(self.text, self._ends, memory)
        self._left = self.text[kernels.rows_end(self.text, self._ends) :]
        self.end -= len(self._left)
        return found

    def release(self) -> None:
        """See source.Slab."""
        if not len(self._left):
            self.pool.give(self.text.base)

    def rest(self, kernels: ModuleType) -> "TextSlab | None":
        """See source.Slab."""
        if not len(self._left):
            return None
        slab = replace(self, end=self.end + len(self._left), text=self._left)
        slab.prepare(kernels)
        return slab

    def describe(self, rows: Sequence[int], codes: Sequence[int]) -> list[str]:
        """See source.Slab."""
        return [
            faults.describe(self.text, begin, end, code, self.labelled)
            for (begin, end), code in zip(faults.places(self.text, rows), codes, strict=True)
        ]


def blank_bytes(tail: bytes) -> int:
    """How many of the last bytes of a text are blank lines, given its last BLANK_BYTES, or all of it if it has less."""
    if len(tail) < BLANK_BYTES and not tail.strip(b"\r\n"):
        return len(tail)
    newline = tail.find(b"\n", len(tail.rstrip(b"\r\n")))
    return len(tail) - newline - 1 if newline >= 0 else 0


def text_size(source: Source) -> int:
    """Bytes of a source of plain text without the blank lines at the end of its file."""
    with open(source.path, "rb") as file:
        if source.begin + source.size < file.seek(0, os.SEEK_END):
            return source.size
        file.seek(max(source.begin, source.begin + source.size - BLANK_BYTES))
        return source.size - blank_bytes(file.read(min(BLANK_BYTES, source.size)))


def too_long(path: Path, slab_bytes: int) -> DataError:
    """The error of a slab without a newline."""
    return DataError(
        f"{path}: no end of row within {slab_bytes} bytes; expected rows of about 250 bytes. "
        "If the file is right, raise --slab-bytes"
    )


class _Share(NamedTuple):
    """What was found in some bytes of a source; slab: None where no row begins in them, or none is wanted."""

    size: int
    crc32: int
    slab: TextSlab | None


class _PlainText:
    """A source opened for reading by several threads, each in memory of its own."""

    def __init__(self, source: Source, day: int, slab_bytes: int, skip: int, pool: Pool):
        self._source, self._day, self._slab_bytes, self._skip, self._pool = source, day, slab_bytes, skip, pool
        self._share = slab_bytes - min(TAIL_BYTES, slab_bytes // 2)
        self._file, self._end = os.open(source.path, os.O_RDONLY), max(skip, text_size(source))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def shares(self, prepare: Callable[[TextSlab], None]) -> Iterator[Callable[[], _Share]]:
        """What reads each share, in order; the first `skip` bytes and blank lines at the end only for the checksum."""
        ends = 0, self._skip, self._end, self._source.size
        for (first, last), call in zip(pairwise(ends), (self._sum, self._slab, self._sum), strict=True):
            for begin in range(first, last, self._share):
                yield partial(call, begin, min(begin + self._share, last), prepare)

    def _read(self, buffer: np.ndarray, begin: int) -> int:
        """Fill the buffer from byte `begin` of the source on; returns the CRC-32 of what it holds then."""
        view, done, found = memoryview(buffer), 0, 0
        while done < len(buffer):
            count = os.preadv(self._file, [view[done : done + PIECE_BYTES]], self._source.begin + begin + done)
            if not count:
                end = begin + done
                raise DataError(
                    f"{self._source.path}: expected {self._source.size} bytes, as when it was opened, found an end "
                    f"behind {end}: it became shorter meanwhile; fetch it again, and leave it alone until the end"
                )
            found = crc32(view[done : done + count], found)
            done += count
        return found

    def _sum(self, begin: int, end: int, _) -> _Share:
        """Bytes begin to end, for the checksum alone."""
        buffer = self._pool.take(self._slab_bytes)
        found = self._read(buffer[: end - begin], begin)
        self._pool.give(buffer)
        return _Share(end - begin, found, None)

    def _slab(self, begin: int, end: int, prepare: Callable[[TextSlab], None]) -> _Share:
        """Bytes begin to end, and the rows that begin there."""
        buffer, size = self._pool.take(self._slab_bytes), end - begin
        found = self._read(buffer[:size], begin)
        first = 0
        if begin > self._skip and os.pread(self._file, 1, self._source.begin + begin - 1) != b"\n":
            first = _behind_newline(buffer[:size], 0)
            if not first:  # one row goes on all through the share
                self._pool.give(buffer)
                return _Share(size, found, None)
        if first == size:
            self._pool.give(buffer)
            return _Share(size, found, None)
        buffer, last = self._to_row_end(buffer, first, begin, size)
        slab = TextSlab(self._day, begin + last, buffer[first:last], self._pool)
        prepare(slab)
        return _Share(size, found, slab)

    def _to_row_end(self, buffer: np.ndarray, first: int, begin: int, size: int) -> tuple[np.ndarray, int]:
        """Read on to where the last row of buffer[first:size] ends; returns the buffer, or a larger one in its place,
        and the place behind that row's newline. buffer[0] is byte `begin` of the source."""
        left, last = self._end - begin, size
        while buffer[last - 1] != NEWLINE and last < left:
            if last == len(buffer):
                row = _behind_last_newline(buffer[first:size]) + first
                if last >= row + self._slab_bytes:
                    raise too_long(self._source.path, self._slab_bytes)
                grown = self._pool.take(row + self._slab_bytes)
                grown[:last] = buffer
                self._pool.give(buffer)
                buffer = grown
            more = buffer[last : min(last + STEP_BYTES, left)]
            self._read(more, begin + last)
            last += _behind_newline(more, 0) or len(more)
        return buffer, last


def _behind_newline(text: np.ndarray, begin: int) -> int:
    """The place behind the first newline of text, uint8 [bytes], from `begin` on; 0 if there is none."""
    for start in range(begin, len(text), STEP_BYTES):
        found = text[start : start + STEP_BYTES].tobytes().find(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def _behind_last_newline(text: np.ndarray) -> int:
    """The place behind the last newline of text, uint8 [bytes]; 0 if there is none."""
    return text.tobytes().rfind(b"\n") + 1


def read_plain(
    source: Source, day: int, slab_bytes: int, skip: int, *, pool: Pool, prepare: Callable[[TextSlab], None],
    threads: int, initializer: Callable[[], None] = nothing,
) -> Iterator[TextSlab]:  # fmt: skip
    """Slabs of a day of plain text from byte `skip` on, where a row begins; see extract.read_day.

    A slab has at most slab_bytes, but for one with a row of more than TAIL_BYTES: its last row may end behind. Raises
    DataError where a row has more than slab_bytes, and where the file has become shorter.
    """
    with (
        closing(_PlainText(source, day, slab_bytes, skip, pool)) as text,
        # Its threads end before the file is closed that they read.
        closing(in_order(text.shares(prepare), threads, initializer)) as shares,
    ):
        for share in shares:
            source.crc32 = crc.combine(source.crc32, share.crc32, share.size)
            source.read += share.size
            if share.slab is not None:
                yield share.slab
