"""How much memory a row group takes to decode, found out before: files of some kilobytes can ask for gigabytes."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from gpu_etl.common.errors import DataError
from gpu_etl.raw.parquet_pages import DICTIONARY_PAGE, Chunk, PageError

MOST_BYTES = 2 << 30  # of a row group's pages and strings at a time
LEAST_ROWS = 64  # that are decoded at a time
SLABS = 4  # that wait or are worked on while the next one is decoded
MOST_ROWS_A_BYTE = 1000  # of a file; real ones have less than one
STRINGS = "BYTE_ARRAY"
REMEDY = "write it anew with pages of about 1 MiB and without such values, or give this process more memory"


def _number_in(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def memory_left() -> int:
    """Bytes that this process may still take: by what the machine has free, its control group, its own limit."""
    pages = Path("/proc/self/statm").read_text().split()
    left = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            left = [int(line.split()[1]) << 10]
    limit, used = _number_in("/sys/fs/cgroup/memory.max"), _number_in("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        left.append(limit - used)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left.append(limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(left))


def check_rows(file: pq.ParquetFile, path: Path, size: int) -> None:
    """Raise DataError where a file has more rows than its bytes can hold: runs of one value without end."""
    rows = max(file.metadata.num_rows, sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
    if rows > MOST_ROWS_A_BYTE * size:
        raise DataError(
            f"{path}: expected rows of about 250 bytes, found {rows:,} rows in {size:,} bytes: repeats of one row, "
            "or a damaged footer; fetch it again"
        )


def rows_at_a_time(file: pq.ParquetFile, path: Path, group: int, names: Sequence[str], most: int) -> int:
    """How many rows of a row group, `most` or fewer, are decoded within half of the memory that is left and MOST_BYTES,
    by the headers of the pages of the columns `names`.

    While a page is decoded it is there packed and unpacked, and its strings once more; a string of a dictionary, and a
    beginning that strings share, is there as often as rows have it. Raises DataError, with the column that takes most,
    where not even LEAST_ROWS fit, and where pages are not what they say.
    """
    meta, room = file.metadata.row_group(group), min(MOST_BYTES, memory_left() // 2)
    fixed, by_row, largest = 0, 0, (-1, "", "")
    with open(path, "rb") as stored:
        for place in range(meta.num_columns):
            column = meta.column(place)
            if column.path_in_schema not in names:
                continue
            try:
                nullable = file.schema.column(place).max_definition_level > 0
                pages, longest = _column(Chunk(stored, column, nullable), room)
            except PageError as error:
                where = f"{path}: row group {group}, column {column.path_in_schema!r}"
                raise DataError(f"{where}: damaged or cut-off Parquet file ({error}); fetch it again") from error
            fixed, by_row = fixed + pages, by_row + longest
            words = f"{pages:,} bytes for its pages, strings of about {longest:,} bytes"
            if pages + LEAST_ROWS * longest > largest[0]:
                largest = pages + LEAST_ROWS * longest, column.path_in_schema, words
    fits = (room - fixed) // (SLABS * max(1, by_row))
    if fits < min(LEAST_ROWS, most):
        _, name, words = largest
        raise DataError(
            f"{path}: row group {group}, column {name!r}: {words}; all columns take {fixed:,} bytes, and "
            f"{by_row:,} a row, to decode; expected at most {room:,} for {SLABS} times {LEAST_ROWS} rows (half of "
            f"what is free, 2 GiB at most); {REMEDY}"
        )
    return min(most, fits)


def _column(chunk: Chunk, room: int) -> tuple[int, int]:
    """Bytes that the pages of a column take at a time, and bytes a row. Pages that do not fit are not looked into."""
    strings = chunk.meta.physical_type == STRINGS
    packed = unpacked = dictionary = 0
    longest = 0 if strings else 8
    for page in chunk.pages():
        packed = max(packed, page.stored)
        if page.kind == DICTIONARY_PAGE:
            dictionary += 2 * page.size
        else:
            unpacked = max(unpacked, page.size)
        if packed + unpacked + dictionary > room:
            return packed + 3 * unpacked + dictionary, max(longest, page.size if strings else 0)
        if strings:
            longest = max(longest, chunk.longest(page))
    return packed + unpacked * (3 if strings else 1) + dictionary, longest
