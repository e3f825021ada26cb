"""Day files -> slabs of whole rows, in bounded memory; threads read and inflate ahead while earlier ones are parsed."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Protocol

import numpy as np

from gpu_etl import codecs, crc, kinds, packages, part_files
from gpu_etl.errors import DataError
from gpu_etl.memory import Pool, Reused
from gpu_etl.prefetch import in_turn, nothing
from gpu_etl.sources import check_read, check_unchanged, checksum, stamp_of
from gpu_etl.text import BLANK_BYTES, NEWLINE, Source, TextSlab, blank_bytes, read_plain, too_long

TAIL_BYTES = 1 << 16
ZSTD_PIECE = 1 << 12
PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")  # a frame, and the note that pzstd writes before each frame


class Slab(Protocol):
    """Some whole rows of one day. `day` is its place in the list of inputs; `part` that of the file among those of the
    day, and `end` the place in that file behind this slab (bytes of text, or rows of Parquet), from which read_day goes
    on if told to skip so far."""

    day: int
    end: int
    part: int

    def prepare(self, kernels: ModuleType) -> None:
        """Do what comes before parse() and can be done in a thread that reads ahead."""

    def parse(self, kernels: ModuleType, memory: Reused) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def open_sources(paths: list[Path]) -> list[Source]:
    """Check that every input is a file that can be read, or a folder of part files, and none named twice or without a
    byte. Raises DataError if not."""
    sources: list[Source] = []
    for path in map(Path, paths):
        source = _open_parts(path) if part_files.is_day(path) else _open_file(path)
        if source.size == 0:
            raise DataError(f"{path}: the file is empty; expected rows of 40 tab-separated fields")
        sources.append(source)
    seen: set[tuple[int, int]] = set()
    for path in (file.path for source in sources for file in source.files):
        found = path.stat()
        if (found.st_dev, found.st_ino) in seen:
            raise DataError(f"{path}: the same day file is named twice")
        seen.add((found.st_dev, found.st_ino))
    return sources


def _open_parts(folder: Path) -> Source:
    """The source of a day of part files, of which those without a byte have no row and are left out."""
    parts = tuple(part for path in part_files.part_files(folder) if (part := _open_file(path)).size)
    return Source(folder, sum(part.size for part in parts), parts=parts)


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise DataError(f"{path}: expected a day file (text, gzip, zstd or Parquet), found {kinds.no_file(path)}")
    if path.parts[:2] in kinds.OF_THIS_PROCESS:  # as /dev/stdin of `< day_0`: another file to another process
        path = path.resolve(strict=True)
    kind, stamp = kind_of(path), stamp_of(path)
    if kind == "zstd":
        packages.require("zstandard", str(path), "unpack it first: `zstd -d`")
    if kind != "parquet" and stamp.size:
        kinds.check(path, None if kind == "text" else kind)
    return Source(path, stamp.size, stamp=stamp)


def _fill(stream, buffer: np.ndarray, filled: int) -> int:
    """Read until the buffer is full or the stream ends; returns the number of valid bytes."""
    view = memoryview(buffer)
    while filled < len(buffer):
        count = stream.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


def _last_newline(buffer: np.ndarray) -> int:
    """Position of the last newline in buffer uint8 [bytes], -1 if there is none."""
    for end in range(len(buffer), 0, -TAIL_BYTES):
        begin = max(0, end - TAIL_BYTES)
        found = np.flatnonzero(buffer[begin:end] == NEWLINE)
        if len(found):
            return begin + int(found[-1])
    return -1


def skip_bytes(stream, count: int) -> None:
    """Read and forget `count` bytes."""
    buffer = np.empty(min(count, 1 << 20), np.uint8)
    while count:
        done = _fill(stream, buffer[:count], 0)
        if not done:
            return
        count -= done


def _cut(stream, path: Path, day: int, slab_bytes: int, end: int, pool: Pool) -> Iterator[TextSlab]:
    """Slabs of at most `slab_bytes`, each but the last ending with a newline; the rest of a row moves to the next, and
    so do blank lines, which are no rows at the end of the day.

    `end`: how many bytes of text came before.
    """
    rest = np.empty(0, np.uint8)
    while True:
        buffer = pool.take(slab_bytes)
        buffer[: len(rest)] = rest
        filled = _fill(stream, buffer, len(rest))
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


def _read_packed(source: Source, day: int, slab_bytes: int, skip: int, kind: str, pool: Pool) -> Iterator[TextSlab]:
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


def kind_of(path: Path) -> str:
    """What a day file is by its first bytes: "text", "gzip", "zstd" or "parquet"."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == PARQUET_MAGIC:
        return "parquet"
    return "gzip" if magic[:2] == GZIP_MAGIC else "zstd" if magic in ZSTD_MAGICS else "text"


def read_day(
    source: Source, day: int, slab_bytes: int, skip: int = 0, *, part: int = 0, pool: Pool | None = None,
    readers: Mapping[str, Callable[..., Iterator[Slab]]] = MappingProxyType({}),
    prepare: Callable[[Slab], None] = lambda slab: None, threads: int = 1, files_at_once: int = 1,
    initializer: Callable[[], None] = nothing, label_optional: bool = False,
) -> Iterator[Slab]:  # fmt: skip
    """Slabs of one day: text, gzip, zstd or Parquet, told by its first bytes, not its name; from place `skip` of its
    file `part` on.

    pool: gives the memory of text; readers: a device's own ways to read a kind of file (cuda.readers), in place of
    those here. prepare: called with each slab before it comes. threads: so many read a file of plain text, and prepare
    its slabs; files_at_once: so many files of a day are read side by side; each thread begins with initializer().
    label_optional: whether Parquet without a column of labels is taken, too.

    Raises DataError where packed data are damaged or end early, and where a Parquet file has not the 40 columns;
    also where the bytes read are not as many as the source has, or the file was written to since.
    """
    pool = pool or Pool()

    def slabs_of(file: Source, skip: int) -> Iterator[Slab]:
        return _read_file(
            file, day, slab_bytes, skip, pool=pool, readers=readers, prepare=prepare, threads=threads,
            initializer=initializer, label_optional=label_optional,
        )  # fmt: skip

    if not source.parts:
        yield from slabs_of(source, skip)
        return
    for file in source.parts[:part]:  # for the checksum alone
        file.crc32, file.read = int(checksum(file.path, file.size), 16), file.size
        check_unchanged(file)
        _add_file(source, file)
    left = source.parts[part:]
    slabs = [slabs_of(file, 0 if place else skip) for place, file in enumerate(left)]
    with closing(in_turn(slabs, files_at_once, initializer=initializer)) as turns:
        for place, slab in turns:
            if slab is None:
                _add_file(source, left[place])
            else:
                slab.part = part + place
                yield slab


def _add_file(day: Source, file: Source) -> None:
    """Note in a day of part files that one more of them was read."""
    day.crc32, day.read = crc.combine(day.crc32, file.crc32, file.size), day.read + file.size


def _read_file(
    source: Source, day: int, slab_bytes: int, skip: int, *, pool: Pool,
    readers: Mapping[str, Callable[..., Iterator[Slab]]], prepare: Callable[[Slab], None], threads: int,
    initializer: Callable[[], None], label_optional: bool,
) -> Iterator[Slab]:  # fmt: skip
    """Slabs of one file; see read_day."""
    kind, before = kind_of(source.path), source.read
    if kind == "text" and kind not in readers:
        yield from read_plain(
            source, day, slab_bytes, skip, pool=pool, prepare=prepare, threads=threads, initializer=initializer
        )
        check_read(source, source.read - before)
        return
    if kind == "parquet":
        from gpu_etl import parquet  # here, as it needs this module, and text does without pyarrow

        decoded = readers.get(kind, parquet.arrow_slabs)
        slabs = parquet.read_parquet(source, day, slab_bytes, skip, decoded, label_optional)
    elif kind in readers:
        slabs = readers[kind](source, day, slab_bytes, skip)
    else:
        slabs = _read_packed(source, day, slab_bytes, skip, kind, pool)
    for slab in slabs:
        prepare(slab)
        yield slab
    check_read(source, source.read - before)
