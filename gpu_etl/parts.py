"""What one task of a cluster counts: a whole day file, or a range of bytes of a plain text one."""

from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_etl.crc import combine
from gpu_etl.extract import Source, kind_of
from gpu_etl.integrity import read_json, write_json
from gpu_etl.settings import Settings
from gpu_etl.tally import Tally

MIN_BYTES = 64 << 20  # a smaller range is not worth a task
PARTS_A_WORKER = 2
BLOCK_BYTES = 1 << 20
FILE_NAME = "parts.json"


@dataclass(frozen=True)
class Part:
    """Bytes begin to end of a day file, whole rows of which the first has the number first_row in its day.

    number: its place among all parts, which are in file order; folder: where its task works.
    """

    number: int
    day: int
    begin: int
    end: int
    first_row: int = 0

    def folder(self, work: Path) -> Path:
        """Where this part's coded rows, dictionaries and journal lie."""
        return work / f"part_{self.number}"


def cut(sources: list[Source], settings: Settings, workers: int) -> list[tuple[int, int, int]]:
    """(day, begin, end) of the parts: plain text days are cut where there are too few of them for all workers.

    Only where no row is left out: which rows those are depends on the numbers of the rows before them, and a part
    begins before the ones in front of it were parsed.
    """
    share = max(MIN_BYTES, sum(source.size for source in sources) // (PARTS_A_WORKER * workers))
    found = []
    for day, source in enumerate(sources):
        pieces = round(source.size / share) if settings.keeps_all_rows and kind_of(source.path) == "text" else 1
        ends = {_row_end(source, source.size * i // pieces) for i in range(1, pieces)} | {source.size}
        begin = 0
        for end in sorted(ends):
            found.append((day, begin, end))
            begin = end
    return found


def _row_end(source: Source, position: int) -> int:
    """Where the row that holds the byte at `position` ends, behind its newline."""
    with open(source.path, "rb") as file:
        file.seek(position)
        file.readline()
        return min(file.tell(), source.size)


def count_rows(path: Path, begin: int, end: int) -> int:
    """Task: how many newlines there are in some bytes of a file."""
    found = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        buffer = bytearray(BLOCK_BYTES)
        while begin < end and (count := file.readinto(memoryview(buffer)[: end - begin])):
            found += buffer.count(b"\n", 0, count)
            begin += count
    return found


def save(parts: list[Part], work: Path) -> None:
    """Keep the parts, so that a later run goes on with the same ones whatever the number of its workers."""
    write_json(work / FILE_NAME, [asdict(part) for part in parts])


def load(work: Path) -> list[Part]:
    """The parts of an earlier run; none if it came to none. Raises WorkDamagedError where their file is damaged."""
    return [Part(**fields) for fields in read_json(work / FILE_NAME) or []]


def by_day(parts: list[Part], tallies: list[Tally], days: int) -> list[Tally]:
    """Tallies of whole days from those of their parts."""
    found = [Tally(crc32="00000000") for _ in range(days)]
    for part, tally in zip(parts, tallies, strict=True):
        day = found[part.day]
        day.add(tally.read, tally.kept, 0, tally.clicks, tally.missing, tally.smallest, tally.dropped)
        day.end = part.begin + tally.end
        day.crc32 = f"{combine(int(day.crc32, 16), int(tally.crc32, 16), part.end - part.begin):08x}"
    return found
