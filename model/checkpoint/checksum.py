"""CRC-32 of files: by isal where it is installed, else by zlib, the same sums, more slowly."""

import sys
import zlib
from functools import cache
from pathlib import Path

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

BLOCK = 1 << 20


@cache
def _say_slower() -> None:
    """Once a process: what runs in isal's place."""
    print("isal is missing: checksums of checkpoints by zlib, which is slower; pip install isal", file=sys.stderr)


def crc32(path: Path) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits."""
    if not isal_zlib:
        _say_slower()
    update, found = (isal_zlib or zlib).crc32, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = update(block, found)
    return f"{found:08x}"
