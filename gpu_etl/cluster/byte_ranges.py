"""What one task of a cluster counts: a whole day, one of its files, or a range of bytes of a plain text one."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpu_etl.common.crc import combine
from gpu_etl.passes.integrity import read_json, write_json
from gpu_etl.passes.settings import Settings
from gpu_etl.raw.reader import kind_of
from gpu_etl.raw.source import Source
from gpu_etl.raw.text import NEWLINE
from gpu_etl.rows.statistics import DayStatistics

MIN_BYTES = 64 << 20  # a smaller range is not worth a task
PARTS_A_WORKER = 2
BLOCK_BYTES = 1 << 20
FILE_NAME = "parts.json"
COUNTED = {"text", "parquet"}  # kinds of file whose rows can be counted without reading them as rows


class Range(NamedTuple):
    """Bytes begin to end of file `file` of a day; file is None for all files of the day, joined to one."""

    day: int
    file: int | None
    begin: int
    end: int

    def source(self, days: list[Source]) -> Source:
        """The source of these bytes, of which nothing was read."""
        day = days[self.day].fresh()
        if self.file is None:
            return day
        return replace(day.files[self.file], begin=self.begin, size=self.end - self.begin)


@dataclass(frozen=True)
class CountTask:
    """Some bytes of a day, whole rows of which the first has the number first_row in its day, and the first of its file
    file_row.

    number: its place among all parts, which are in file order; folder: where its task works.
    """

    number: int
    day: int
    file: int | None
    begin: int
    end: int
    first_row: int = 0
    file_row: int = 0

    @property
    def range(self) -> Range:
        """The bytes."""
        return Range(self.day, self.file, self.begin, self.end)

    def folder(self, work: Path) -> Path:
        """Where this part's coded rows, dictionaries and journal lie."""
        return work / f"part_{self.number}"


def cut(sources: list[Source], settings: Settings, workers: int) -> list[Range]:
    """The bytes of each part: the files of a day, and pieces of a plain text one where there are too few for all
    workers.

    A day is one part where rows are left out, as which ones depends on the numbers of the rows before them, and a part
    begins before the ones in front of it were parsed; also where a file of it would have to be inflated to be counted.
    """
    share = max(MIN_BYTES, sum(source.size for source in sources) // (PARTS_A_WORKER * workers))
    found = []
    for day, source in enumerate(sources):
        kinds = {kind_of(file.path) for file in source.files}
        if not settings.keeps_all_rows or not kinds <= COUNTED:
            found.append(Range(day, None, 0, source.size))
            continue
        for place, file in enumerate(source.files):
            pieces = round(file.size / share) if kind_of(file.path) == "text" else 1
            ends = {_row_end(file, file.size * i // pieces) for i in range(1, pieces)} | {file.size}
            begin = 0
            for end in sorted(ends):
                found.append(Range(day, place, begin, end))
                begin = end
    return found


def _row_end(source: Source, position: int) -> int:
    """Where the row that holds the byte at `position` ends, behind its newline."""
    with open(source.path, "rb") as file:
        file.seek(position)
        file.readline()
        return min(file.tell(), source.size)


def count_rows(path: Path, begin: int, end: int) -> int:
    """Task: how many rows there are in some bytes of a file of text, or in a Parquet file."""
    if kind_of(path) == "parquet":
        from pyarrow import parquet  # here, as text does without it

        return parquet.read_metadata(path).num_rows
    found, last = 0, NEWLINE
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        buffer = bytearray(BLOCK_BYTES)
        while begin < end and (count := file.readinto(memoryview(buffer)[: end - begin])):
            found += buffer.count(b"\n", 0, count)
            begin, last = begin + count, buffer[count - 1]
    return found + (last != NEWLINE)


def save(parts: list[CountTask], work: Path) -> None:
    """Keep the parts, so that a later run goes on with the same ones whatever the number of its workers."""
    write_json(work / FILE_NAME, [asdict(part) for part in parts])


def load(work: Path) -> list[CountTask]:
    """The parts of an earlier run; none if it came to none. Raises WorkDamagedError where their file is damaged."""
    return [CountTask(**fields) for fields in read_json(work / FILE_NAME) or []]


def by_day(parts: list[CountTask], tallies: list[DayStatistics], days: int) -> list[DayStatistics]:
    """Tallies of whole days from those of their parts."""
    found = [DayStatistics(crc32="00000000") for _ in range(days)]
    for part, tally in zip(parts, tallies, strict=True):
        day = found[part.day]
        day.add(tally.read, tally.kept, 0, tally.clicks, tally.missing, tally.smallest, tally.dropped)
        day.crc32 = f"{combine(int(day.crc32, 16), int(tally.crc32, 16), part.end - part.begin):08x}"
    return found
