"""Plain text from storage straight into device memory, where GPUDirect Storage is at hand: through KvikIO.

Elsewhere extract.py reads it into pinned memory. Nothing of the text passes through the host, so its checksum is taken
on the device.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from gpu_etl import crc
from gpu_etl.cuda_launch import THREADS, blocks_for, stream
from gpu_etl.cuda_rows import give_room, parse, take_room
from gpu_etl.errors import DataError
from gpu_etl.extract import Source, TextSlab, too_long
from gpu_etl.memory import Pool
from gpu_etl.rows import NEWLINE

PAGE = 4096  # reads that begin at a multiple of it go directly
TAIL_BYTES = 1 << 16
PIECE = 4096  # bytes of one thread's checksum


def is_there() -> bool:
    """Whether KvikIO is installed and would read directly; KVIKIO_COMPAT_MODE=ON in the environment forbids it."""
    if not importlib.util.find_spec("kvikio"):
        return False
    from kvikio import defaults

    return not defaults.is_compat_mode_preferred()


@cuda.jit
def _checksums(text, table, crcs):
    """crcs[i] = CRC-32 of piece i of the text, PIECE bytes. Reads each byte once; the table is looked up in shared
    memory."""
    remainders = cuda.shared.array(256, np.uint32)
    for i in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        remainders[i] = table[i]
    cuda.syncthreads()
    piece = cuda.grid(1)
    if piece < len(crcs):
        found = np.uint32(0xFFFFFFFF)
        for position in range(piece * PIECE, min((piece + 1) * PIECE, len(text))):
            found = remainders[(found ^ text[position]) & 255] ^ found >> np.uint32(8)
        crcs[piece] = found ^ np.uint32(0xFFFFFFFF)


@cache
def _table():
    return cuda.to_device(crc.table())


def _checksum(text) -> int:
    """CRC-32 of text on the device."""
    pieces, reading = -(-len(text) // PIECE), stream("read")
    if not pieces:
        return 0
    crcs = cuda.device_array(pieces, np.uint32, stream=reading)
    _checksums[blocks_for(pieces), THREADS, reading](text, _table(), crcs)
    return int(crc.combine_pieces(_download(crcs), PIECE, len(text)))


def _download(array) -> np.ndarray:
    """A device array that only the stream "read" has to do with."""
    found = array.copy_to_host(stream=stream("read"))
    stream("read").synchronize()
    return found


def _behind_last_newline(text) -> int:
    """Bytes of text on the device up to its last newline; 0 if there is none."""
    for end in range(len(text), 0, -TAIL_BYTES):
        begin = max(0, end - TAIL_BYTES)
        found = np.flatnonzero(_download(text[begin:end]) == NEWLINE)
        if len(found):
            return begin + int(found[-1]) + 1
    return 0


@dataclass
class DeviceText:
    """What cuda_rows.parse takes: see cuda_launch.Upload."""

    room: Any
    bytes: Any
    last: int = NEWLINE

    def wait(self) -> None:
        """Nothing to wait for: it was read before."""


@dataclass
class DirectSlab:
    """Some whole rows on the device, a slab as of extract.Slab: bytes `begin` to `end` of the source."""

    day: int
    begin: int
    end: int
    source: Source
    text: DeviceText

    def prepare(self, kernels) -> None:
        """Nothing to do: parse() finds the rows."""

    def parse(self, kernels, memory):
        """See extract.Slab."""
        return parse(None, self.text, memory)

    def release(self) -> None:
        """Nothing to do: parse() has given the memory back."""

    def describe(self, row: int, code: int) -> str:
        """See extract.Slab; the text is read again."""
        begin = self.source.begin + self.begin
        text = np.fromfile(self.source.path, np.uint8, self.end - self.begin, offset=begin)
        return TextSlab(self.day, self.end, text, Pool()).describe(row, code)


class _File:
    """A source opened for direct reading."""

    def __init__(self, source: Source):
        import kvikio

        self._source, self._file = source, kvikio.CuFile(source.path)

    def read(self, begin: int, end: int):
        """Bytes begin to end of the source: (memory of the device, a view [end - begin] of it). Raises DataError where
        the file has become shorter."""
        place = self._source.begin + begin
        lead = place % PAGE
        size = lead + end - begin
        room = take_room(size)
        found = self._file.pread(room[:size], size, place - lead).get()
        if found != size:
            raise DataError(f"{self._source.path}: {size - found} bytes fewer than when it was opened; fetch it again")
        return room, room[lead:size]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def direct_slabs(source: Source, day: int, slab_bytes: int, skip: int) -> Iterator[DirectSlab]:
    """Slabs of a plain text day of at most slab_bytes, from byte `skip` on, as extract.read_day makes them."""
    file = _File(source)
    try:
        for begin in range(0, skip, slab_bytes):  # read for the checksum
            room, text = file.read(begin, min(begin + slab_bytes, skip))
            _note(source, text)
            give_room(room)
        begin = skip
        while begin < source.size:
            end = min(begin + slab_bytes, source.size)
            room, text = file.read(begin, end)
            last = NEWLINE
            if end < source.size:
                end = begin + _behind_last_newline(text)
                if end == begin:
                    raise too_long(source.path, slab_bytes)
            else:
                last = int(_download(text[-1:])[0])
            text = text[: end - begin]
            _note(source, text)
            yield DirectSlab(day, begin, end, source, DeviceText(room, text, last))
            begin = end
    finally:
        file.close()


def _note(source: Source, text) -> None:
    """Note in the source that this text of it was read."""
    source.crc32 = crc.combine(source.crc32, _checksum(text), len(text))
    source.read += len(text)
