"""What proves that a day file is still the one that was looked at: its size, its time of change, its checksum."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tqdm import tqdm

from gpu_etl import codecs
from gpu_etl.errors import DataError

BLOCK_BYTES = 1 << 20


class Stamp(NamedTuple):
    """Bytes of a whole file, and when it was last written to, in nanoseconds."""

    size: int
    mtime_ns: int


class Stamped(Protocol):
    """What is asked of a source here; see source.Source."""

    path: Path
    size: int
    read: int
    stamp: Stamp | None

    @property
    def files(self) -> tuple["Stamped", ...]: ...


def located(source: Stamped) -> list[tuple[str, Stamp | None]]:
    """Path and stamp of each file of a source."""
    return [(str(file.path.resolve()), file.stamp) for file in source.files]


@dataclass(frozen=True)
class Recorded:
    """What an earlier run wrote down of a day: what located() gave, and the CRC-32 of all its bytes as 8 hex digits;
    crc32 is None where that run did not come to the day's end, begun says whether it read any row of it."""

    files: list[tuple[str, Stamp]]
    crc32: str | None
    begun: bool = True


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns)


def check_read(source: Stamped, read: int) -> None:
    """Raise DataError where `read` bytes are not all of a source, or its file is not what it was."""
    if read != source.size:
        raise DataError(
            f"{source.path}: expected {source.size:,} bytes as when this run began, read {read:,}: the file was cut "
            "off while it was read; fetch it again, let nothing write to it, and give the same command again"
        )
    check_unchanged(source)


def check_unchanged(source: Stamped, error_type: type[DataError] = DataError) -> None:
    """Raise such an error where a source's file is not the one of its stamp any more."""
    for file in source.files:
        _check_file(file, error_type)


def _check_file(source: Stamped, error_type: type[DataError]) -> None:
    if source.stamp is None:
        return
    try:
        found = stamp_of(source.path)
    except OSError as error:
        raise error_type(
            f"{source.path}: the day file is gone since this run began ({error.strerror}); bring it back, and give the "
            "same command again"
        ) from error
    if found != source.stamp:
        what = f"{source.stamp.size:,} bytes, {found.size:,} now" if found.size != source.stamp.size else "same size"
        raise error_type(
            f"{source.path}: the day file was written to since this run began ({what}); wait until it is complete, "
            "then give the same command again"
        )


def checksum(path: Path, size: int, progress: Callable[[int], None] = lambda count: None, crc32: int = 0) -> str:
    """CRC-32 of the first `size` bytes of a file, as 8 hex digits; crc32: of what comes before them. progress: called
    with bytes read since last time."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size and (count := file.readinto(buffer[:size])):
            crc32 = codecs.crc32(buffer[:count], crc32)
            size -= count
            progress(count)
    return f"{crc32:08x}"


def other_bytes(expected: Iterable[tuple[Stamped, str]], why: str) -> list[Path]:
    """The sources whose CRC-32 is not the expected one; all of them are read. why: what is said before."""
    expected = list(expected)
    if not expected:
        return []
    print(f"comparing the checksums of {len(expected)} day files: {why}", file=sys.stderr)
    total = sum(source.size for source, _ in expected)
    with tqdm(total=total, unit="B", unit_scale=True, desc="compare", file=sys.stderr) as bar:
        return [source.path for source, crc32 in expected if _checksum_of(source, bar.update) != crc32]


def _checksum_of(source: Stamped, progress: Callable[[int], None]) -> str:
    """CRC-32 of the files of a source, joined to one, as 8 hex digits."""
    found = 0
    for file in source.files:
        found = int(checksum(file.path, file.size, progress, found), 16)
    return f"{found:08x}"


def unproven(sources: list[Stamped], recorded: list[Recorded]) -> list[Path]:
    """Day files that are not proven to be those that an unfinished run has read rows of.

    Proof is the same path, size and time of change, or else the checksum, where that run came to the file's end.
    """
    doubtful = [
        (source, before)
        for source, before in zip(sources, recorded, strict=True)
        if before.begun and located(source) != before.files
    ]
    hopeless = [source.path for source, before in doubtful if before.crc32 is None]
    if hopeless:
        return hopeless
    why = "they have another path or time of change than when they were read"
    return other_bytes([(source, before.crc32) for source, before in doubtful], why)


def check_same(sources: list[Stamped], crcs: list[str], out: Path) -> None:
    """Raise DataError where the bytes of the sources are not those that the data set in `out` was made of."""
    changed = other_bytes(zip(sources, crcs, strict=True), f"{out} was made of files of these names and sizes")
    if changed:
        raise DataError(
            f"{out}: a finished data set is there already, made of other bytes than those of "
            f"{', '.join(map(str, changed))}; choose another --out, or delete it first"
        )
