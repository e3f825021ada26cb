"""The pages of a Parquet column: what their headers say, and how long the strings in them are, before they are decoded.

Footers can lie about pages, but a decoder takes from a page's header how much memory it needs, and fails where the page
is another. Headers are in Thrift's compact protocol; names are those of parquet-format's parquet.thrift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.common.jit import compiled

HEADER_BYTES = 1 << 10  # read at first; headers with statistics may be longer
MOST_HEADER_BYTES = 1 << 24
DEPTH = 8  # of structs in a header
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, DELTA_BYTE_ARRAY = 0, 7
CODECS = {"GZIP": "gzip", "SNAPPY": "snappy", "ZSTD": "zstd", "BROTLI": "brotli", "LZ4": "lz4_raw"}

# Types of Thrift's compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


class PageError(ValueError):
    """A page that cannot be what its header says."""


class _ShortError(Exception):
    """There are more bytes of the header."""


class _Thrift:
    """Reads one struct, as {field: value}, from the front of some bytes; values of containers are left out."""

    def __init__(self, data: bytes):
        self._data, self.place = data, 0

    def _byte(self) -> int:
        if self.place >= len(self._data):
            raise _ShortError
        self.place += 1
        return self._data[self.place - 1]

    def _number(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise PageError("a number of more than 64 bits in its header")

    def _signed(self) -> int:
        value = self._number()
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict:
        """The fields of the struct here."""
        fields, number = {}, 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._signed()
            fields[number] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int):
        if depth > DEPTH:
            raise PageError("a header of too many levels")
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self._byte()
        if kind < DOUBLE:
            return self._signed()
        if kind in (DOUBLE, BINARY):
            size = 8 if kind == DOUBLE else self._number()
            self.place += size
            if self.place > len(self._data):
                raise _ShortError
            return None
        if kind == STRUCT:
            return self.struct(depth + 1)
        raise PageError(f"type {kind} in its header")  # containers: no page header has any


class Page(NamedTuple):
    """A page: kind, bytes when unpacked and as stored, values (with nulls), encoding; where it is stored; whether it is
    packed; bytes of levels in front, which version 2 does not pack, None where the page says it itself."""

    kind: int
    size: int
    stored: int
    values: int
    encoding: int
    place: int
    packed: bool
    levels: int | None


@dataclass(frozen=True)
class Chunk:
    """A column of a row group. nullable: whether its values have levels of definition."""

    file: BinaryIO
    meta: pq.ColumnChunkMetaData
    nullable: bool

    def pages(self) -> Iterator[Page]:
        """Its pages in order. Raises PageError where one is not what it says."""
        meta, place = self.meta, self.meta.data_page_offset
        if meta.dictionary_page_offset and 0 < meta.dictionary_page_offset < place:
            place = meta.dictionary_page_offset
        end, values = place + meta.total_compressed_size, 0
        while values < meta.num_values and place < end:
            fields, size = self._header(place)
            page = _page(fields, place + size)
            place += size + page.stored
            values += page.values * (page.kind != DICTIONARY_PAGE)
            yield page

    def _header(self, place: int) -> tuple[dict, int]:
        size = HEADER_BYTES
        while True:
            self.file.seek(place)
            data = self.file.read(size)
            thrift = _Thrift(data)
            try:
                return thrift.struct(), thrift.place
            except _ShortError:
                if len(data) < size or size >= MOST_HEADER_BYTES:
                    raise PageError(f"no whole header at byte {place}") from None
                size *= 16

    def body(self, page: Page) -> np.ndarray | None:
        """The values of a page, uint8 [bytes], without its levels; None where it cannot be unpacked here."""
        self.file.seek(page.place)
        stored = self.file.read(page.stored)
        levels, name = page.levels or 0, CODECS.get(self.meta.compression)
        if page.packed and self.meta.compression != "UNCOMPRESSED":
            try:
                body = pa.Codec(name).decompress(stored[levels:], page.size - levels) if name else None
            except (pa.ArrowException, OSError):
                body = None
            if body is None:
                return None
            body = np.frombuffer(body, np.uint8)
        else:
            body = np.frombuffer(stored, np.uint8)[levels:]
        if page.levels is None and self.nullable:  # version 1: their length, then themselves
            body = body[4 + int.from_bytes(body[:4].tobytes(), "little") :]
        return body

    def longest(self, page: Page) -> int:
        """At most so many bytes has a string of this page, however often it stands there; what the whole page has,
        where that cannot be told."""
        if page.encoding != DELTA_BYTE_ARRAY and page.kind != DICTIONARY_PAGE:
            return -(-page.size // max(1, page.values))  # on average: see parquet_limits
        body = self.body(page)
        if body is None:
            return page.size
        if page.kind == DICTIONARY_PAGE:
            return int(_longest_plain(body))
        return int(_longest_delta(body, page.values))


def _page(fields: dict, place: int) -> Page:
    kind, size, stored = (fields.get(i, -1) for i in (1, 2, 3))
    if not isinstance(size, int) or not isinstance(stored, int) or size < 0 or stored < 0:
        raise PageError(f"a header without sizes at byte {place}")
    header = fields.get({DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}.get(kind, 0), {})
    if not isinstance(header, dict):
        raise PageError(f"a header of another kind at byte {place}")
    second = kind == DATA_PAGE_V2
    values, encoding = header.get(1, 0), header.get(4 if second else 2, PLAIN)
    levels = header.get(5, 0) + header.get(6, 0) if second else None if kind == DATA_PAGE else 0
    if values < 0 or (levels or 0) < 0 or (levels or 0) > min(size, stored):
        raise PageError(f"a header that contradicts itself at byte {place}")
    return Page(kind, size, stored, values, encoding, place, header.get(7, True) if second else True, levels)


@compiled
def _longest_plain(body):
    """The longest of strings that each follow their length, in body uint8 [bytes]."""
    longest = place = 0
    while place + 4 <= len(body):
        size = np.int64(0)
        for i in range(4):
            size |= np.int64(body[place + i]) << (8 * i)
        longest = max(longest, min(size, len(body) - place))
        place += 4 + size
    return longest


@compiled
def _varint(body, place):
    value = np.int64(0)
    shift = 0
    while place < len(body) and shift < 63:
        byte = np.int64(body[place])
        value |= (byte & 127) << shift
        place += 1
        shift += 7
        if byte < 128:
            break
    return value, place


@compiled
def _zigzag(value):
    return (value >> 1) ^ -(value & 1)


@compiled
def _delta_integers(body, place, most):
    """DELTA_BINARY_PACKED integers at body[place], `most` or fewer -> (their number, the largest, the place behind); -1
    for the place where they are none."""
    block, place = _varint(body, place)
    minis, place = _varint(body, place)
    count, place = _varint(body, place)
    last, place = _varint(body, place)
    last, done = _zigzag(last), 1
    largest = last
    if minis < 1 or block < minis or block % minis or count > most:
        return count, largest, -1
    while done < count:
        least, place = _varint(body, place)
        least, widths = _zigzag(least), place
        place += minis
        for mini in range(minis):
            if done >= count:
                break
            width, each = np.int64(body[widths + mini]) if widths + mini < len(body) else 65, block // minis
            if width > 64:
                return count, largest, -1
            for i in range(min(each, count - done)):
                value = np.int64(0)
                for bit in range(i * width, (i + 1) * width):
                    byte = place + (bit >> 3)
                    if byte >= len(body):
                        return count, largest, -1
                    value |= (np.int64(body[byte]) >> (bit & 7) & 1) << (bit - i * width)
                last += least + value
                largest = max(largest, last)
            done += min(each, count - done)
            place += (width * each + 7) >> 3
    return count, largest, place


def _longest_delta(body: np.ndarray, most: int) -> int:
    """No string is longer of those that each are a beginning of the one before and a rest of their own."""
    count, prefix, place = _delta_integers(body, 0, most)
    others, suffix, place = _delta_integers(body, place, most) if place >= 0 else (-1, 0, -1)
    return min(prefix + suffix, len(body)) if place >= 0 and others == count else len(body)
