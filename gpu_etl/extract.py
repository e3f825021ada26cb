"""Day files -> slabs of whole rows, in bounded memory; threads read and inflate ahead while earlier ones are parsed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

from gpu_etl import crc, kinds, packages, part_files
from gpu_etl.errors import DataError
from gpu_etl.memory import Pool
from gpu_etl.packed import read_packed
from gpu_etl.prefetch import in_turn, nothing
from gpu_etl.source import Slab, Source
from gpu_etl.sources import check_read, check_unchanged, checksum, stamp_of
from gpu_etl.text import read_plain

PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")  # a frame, and the note that pzstd writes before each frame


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
        from gpu_etl import parquet  # here, as text does without pyarrow

        decoded = readers.get(kind, parquet.arrow_slabs)
        slabs = parquet.read_parquet(source, day, slab_bytes, skip, decoded, label_optional)
    elif kind in readers:
        slabs = readers[kind](source, day, slab_bytes, skip)
    else:
        slabs = read_packed(source, day, slab_bytes, skip, kind, pool)
    for slab in slabs:
        prepare(slab)
        yield slab
    check_read(source, source.read - before)
