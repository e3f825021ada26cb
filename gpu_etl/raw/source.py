"""A day as it is read: the source of its bytes, and slabs of its rows."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from gpu_etl.common import codecs
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.raw.stamps import Stamp


@dataclass
class Source:
    """One day file, or `size` bytes of a plain text one from `begin` on: how many bytes were read, and the CRC-32 of
    what was read. stamp: of the whole file, None where it is not looked at again. parts: the files of a day of part
    files, whose path is their folder, and whose size, CRC-32 and bytes read are those of the files joined to one."""

    path: Path
    size: int
    begin: int = 0
    read: int = 0
    crc32: int = 0
    stamp: Stamp | None = None
    parts: tuple["Source", ...] = ()

    @property
    def files(self) -> tuple["Source", ...]:
        """The files of the day."""
        return self.parts or (self,)

    def fresh(self) -> "Source":
        """The same source, of which nothing was read."""
        return replace(self, read=0, crc32=0, parts=tuple(part.fresh() for part in self.parts))


class Slab(Protocol):
    """Some whole rows of one day. `day` is its place in the list of inputs; `part` that of the file among those of the
    day, and `end` the place in that file behind this slab (bytes of text, or rows of Parquet), from which read_day goes
    on if told to skip so far."""

    day: int
    end: int
    part: int

    def prepare(self, kernels: ModuleType) -> None:
        """Do what comes before parse() and can be done in a thread that reads ahead."""

    def parse(self, kernels: ModuleType, memory: ScratchBuffer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values uint32 [n, 40], missing uint64 [n], faults int32 [n], as kernels.parse gives them. Where there are
        more rows than good ones can be, those behind the first n are left to rest(), and `end` is where they begin."""

    def describe(self, rows: Sequence[int], codes: Sequence[int]) -> list[str]:
        """Words for the faults `codes` of some rows, in ascending order; parse() comes first."""

    def release(self) -> None:
        """Give back the slab's memory; nothing but rest() may be asked of it any more."""

    def rest(self, kernels: ModuleType) -> "Slab | None":
        """The rows that parse() left, prepared; None where it left none."""


class ChecksummedFile(io.RawIOBase):
    """A source opened for reading that notes in it how far it was read and what the bytes sum up to."""

    def __init__(self, source: Source):
        self._file = open(source.path, "rb", buffering=0)  # noqa: SIM115 - closed in close()
        self._file.seek(source.begin)
        self._source, self._left = source, source.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= count
        self._source.crc32 = codecs.crc32(memoryview(buffer)[:count], self._source.crc32)
        self._source.read += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def fill(stream, buffer: np.ndarray, filled: int) -> int:
    """Read until the buffer is full or the stream ends; returns the number of valid bytes."""
    view = memoryview(buffer)
    while filled < len(buffer):
        count = stream.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


def skip_bytes(stream, count: int) -> None:
    """Read and forget `count` bytes."""
    buffer = np.empty(min(count, 1 << 20), np.uint8)
    while count:
        done = fill(stream, buffer[:count], 0)
        if not done:
            return
        count -= done
