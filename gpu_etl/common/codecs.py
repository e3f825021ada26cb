"""What packs, inflates and checks bytes: isal and zstandard where they are installed.

In isal's place the standard library gives the same bytes more slowly, and one line on stderr says so; in zstandard's
there is nothing.
"""

import gzip
import io
import sys
import zlib
from functools import cache

from gpu_etl.common.packages import install_command

try:
    from isal import igzip, isal_zlib
except ImportError:
    igzip = isal_zlib = None
try:
    import zstandard
except ImportError:
    zstandard = None

# What damaged or cut-off data raise.
ERRORS = (
    EOFError, zlib.error, gzip.BadGzipFile, *((isal_zlib.error, igzip.BadGzipFile) if isal_zlib else ()),
    *((zstandard.ZstdError,) if zstandard else ()),
)  # fmt: skip


@cache
def _say_slower() -> None:
    """Once a process: what runs in isal's place."""
    words = "isal is missing: zlib inflates and checks in its place, the same bytes, about three times slower"
    print(f"{words}; {install_command('isal')}", file=sys.stderr)


def crc32(data, value: int = 0) -> int:
    """CRC-32 of bytes that follow those with the CRC `value`."""
    if isal_zlib:
        return isal_zlib.crc32(data, value)
    _say_slower()
    return zlib.crc32(data, value)


def read_gzip(stored: io.BufferedIOBase) -> io.BufferedIOBase:
    """The text of a gzip file of one or more members, which ends with the last one. Raises one of ERRORS on the way."""
    if igzip:
        return igzip.IGzipFile(fileobj=stored)
    _say_slower()
    return gzip.GzipFile(fileobj=stored)


def write_gzip(stored: io.BufferedIOBase) -> io.BufferedIOBase:
    """What packs all that is written to it into one gzip member, with neither name nor time; closing it leaves `stored`
    open.

    Packed bytes depend on the library, the text in them does not.
    """
    if igzip:
        return igzip.IGzipFile("", "wb", fileobj=stored, mtime=0)
    _say_slower()
    return gzip.GzipFile("", "wb", compresslevel=1, fileobj=stored, mtime=0)


def zstd_frame():
    """What inflates one frame: zstandard's decompressobj."""
    return zstandard.ZstdDecompressor().decompressobj()
