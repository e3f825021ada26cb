"""Plain text from storage straight into device memory, where GPUDirect Storage is at hand: through KvikIO.

Elsewhere extract.py reads it into pinned memory. Nothing of the text passes through the host, so its checksum is taken
on the device.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import cuda

from gpu_etl import crc
from gpu_etl.cuda_kernel import blocks_for, kernel
from gpu_etl.cuda_launch import Input, Memory, Output, launch, stream
from gpu_etl.cuda_rows import parse
from gpu_etl.cuda_text import DeviceText, text_rooms
from gpu_etl.errors import DataError
from gpu_etl.memory import Pool, host_bytes
from gpu_etl.rows import NEWLINE
from gpu_etl.source import Source
from gpu_etl.text import TextSlab, text_size, too_long

PAGE = 4096  # reads that begin at a multiple of it go directly
PIECE = 4096  # bytes of one thread's checksum


def is_there() -> bool:
    """Whether KvikIO is installed and reads from storage into device memory by itself.

    Its setting AUTO, the default, says nothing of that: it may stage every read in host memory, which the reader of
    extract.py does better. KVIKIO_COMPAT_MODE=ON in the environment forbids it.
    """
    if not importlib.util.find_spec("kvikio"):
        return False
    import kvikio
    from kvikio import defaults

    if defaults.is_compat_mode_preferred():
        return False
    try:
        return bool(kvikio.cufile_driver.get("is_gds_available"))
    except (RuntimeError, AttributeError, ValueError):
        return False


@kernel("uint8[::1]", "int64", "int64", "int64[::1]")
def _find_end(text, size, whole, found):
    """found[0] = bytes of text up to its last newline, 0 if there is none, or all `size` where it is `whole`; found[1]
    = the last of those bytes. One block, which reads from the end on."""
    last = cuda.shared.array(1, np.int64)
    if cuda.threadIdx.x == 0:
        last[0] = size * whole
    end = size
    while True:
        cuda.syncthreads()
        if last[0] != 0 or end <= 0:
            break
        position = end - 1 - cuda.threadIdx.x
        cuda.syncthreads()
        if position >= 0 and text[position] == NEWLINE:
            cuda.atomic.max(last, 0, position + 1)
        end -= cuda.blockDim.x
    if cuda.threadIdx.x == 0:
        found[0] = last[0]
        found[1] = 0
        if last[0] > 0:
            found[1] = text[last[0] - 1]


@kernel("uint8[::1]", "int64[::1]", "uint32[::1]", "uint32[::1]")
def _checksums(text, size, table, crcs):
    """crcs[i] = CRC-32 of piece i of the first size[0] bytes of text, PIECE bytes. Reads each byte once; the table is
    looked up in shared memory."""
    remainders = cuda.shared.array(256, np.uint32)
    for i in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        remainders[i] = table[i]
    cuda.syncthreads()
    piece = cuda.grid(1)
    if piece * PIECE < size[0]:
        found = np.uint32(0xFFFFFFFF)
        for position in range(piece * PIECE, min((piece + 1) * PIECE, size[0])):
            found = remainders[(found ^ text[position]) & 255] ^ found >> np.uint32(8)
        crcs[piece] = found ^ np.uint32(0xFFFFFFFF)


@dataclass
class DirectSlab:
    """Some whole rows on the device, a slab as of source.Slab: bytes `begin` to `end` of the source."""

    day: int
    begin: int
    end: int
    source: Source
    text: DeviceText
    part: int = 0

    def prepare(self, kernels) -> None:
        """Nothing to do: parse() finds the rows."""

    def parse(self, kernels, memory):
        """See source.Slab."""
        found = parse(None, self.text, memory)
        self.end = self.begin + self.text.rows_end
        return found

    def release(self) -> None:
        """Nothing to do: parse() has given the memory back."""

    def describe(self, rows, codes) -> list[str]:
        """See source.Slab; the text is read again."""
        return self._on_host(self.begin, self.end, host_bytes).describe(rows, codes)

    def rest(self, kernels) -> TextSlab | None:
        """See source.Slab; the text is read again."""
        begin, end = self.end, self.begin + self.text.size
        if begin == end:
            return None
        slab = self._on_host(begin, end, kernels.host_bytes)
        slab.prepare(kernels)
        return slab

    def _on_host(self, begin: int, end: int, allocate) -> TextSlab:
        text = allocate(end - begin)
        text[:] = np.fromfile(self.source.path, np.uint8, end - begin, offset=self.source.begin + begin)
        return TextSlab(self.day, end, text, Pool(), self.part)


class _File:
    """A source opened for direct reading, and what its slabs are checked with."""

    def __init__(self, source: Source):
        import kvikio

        self._source, self._file = source, kvikio.CuFile(source.path)
        self._table_memory = Input("checksums", np.uint32, "read")
        self._table = self._table_memory.put(crc.table())
        self._crcs, self._end = Memory("checksums", np.uint32), Memory("checksums", np.int64)
        self._host_crcs, self._host_end = Output(np.uint32, "read"), Output(np.int64, "read")

    def read(self, begin: int, end: int, whole: bool) -> DeviceText:
        """The whole rows of bytes begin to end of the source, or all of them, noted in the source as read. Raises
        DataError where the file has become shorter."""
        place = self._source.begin + begin
        lead = place % PAGE
        size = lead + end - begin
        room = text_rooms.take(size)
        room.free.wait()  # KvikIO knows nothing of streams
        found = self._file.pread(room.bytes[:size], size, place - lead).get()
        if found != size:
            raise DataError(f"{self._source.path}: {size - found} bytes fewer than when it was opened; fetch it again")
        used, last, checksum = self._check(room.bytes[lead:size], whole)
        self._source.crc32 = crc.combine(self._source.crc32, checksum, used)
        self._source.read += used
        return DeviceText(room, used, last, lead)

    def _check(self, text, whole: bool) -> tuple[int, int, int]:
        """Bytes of whole rows in a text on the device, the last of them, and their CRC-32."""
        size = len(text)
        pieces = -(-size // PIECE)
        end, crcs = self._end.take(2), self._crcs.take(pieces)
        launch(_find_end, 1, text, size, int(whole), end, on="read")
        launch(_checksums, blocks_for(pieces), text, end, self._table, crcs, on="read")
        sums, ends = self._host_crcs.get(crcs[:pieces]), self._host_end.get(end[:2])
        used, last = ends().tolist()
        return used, last, int(crc.combine_pieces(sums()[: -(-used // PIECE)], PIECE, used)) if used else 0

    def close(self) -> None:
        """Close the file, once nothing is under way that uses the memory of its checksums."""
        stream("read").synchronize()
        self._file.close()


def direct_slabs(source: Source, day: int, slab_bytes: int, skip: int) -> Iterator[DirectSlab]:
    """Slabs of a plain text day of at most slab_bytes, from byte `skip` on, as extract.read_day makes them."""
    file = _File(source)
    try:
        for begin in range(0, skip, slab_bytes):  # read for the checksum
            text_rooms.give(file.read(begin, min(begin + slab_bytes, skip), whole=True).room)
        begin, size = skip, max(skip, text_size(source))
        while begin < size:
            end = min(begin + slab_bytes, size)
            text = file.read(begin, end, whole=end == size)
            if not text.size:
                raise too_long(source.path, slab_bytes)
            yield DirectSlab(day, begin, begin + text.size, source, text)
            begin += text.size
        if size < source.size:  # blank lines at the end
            text_rooms.give(file.read(size, source.size, whole=True).room)
    finally:
        file.close()
