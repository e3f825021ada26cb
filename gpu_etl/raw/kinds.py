"""What a file is that is no day: told by its first bytes, with what to do about it."""

import io
import stat
from pathlib import Path
from typing import NamedTuple

from gpu_etl.common import codecs
from gpu_etl.common.errors import DataError
from gpu_etl.schema import COLUMNS

HEAD_BYTES = 1 << 16
PIECE_BYTES = 1 << 12  # of zstd, which gives all text of a piece at once
SEPARATED = COLUMNS - 2, COLUMNS - 1  # tabs of a row without a label, and with one
SEPARATORS = {b",": "commas", b";": "semicolons", b"|": "bars", b" ": "spaces"}
OF_THIS_PROCESS = ("/", "dev"), ("/", "proc")
EXPECTED = "expected rows of 40 tab-separated fields (text, gzip, zstd) or Parquet"


class _Kind(NamedTuple):
    """What begins with `magic`, `offset` bytes behind the start, in words, and what makes a day of it."""

    magic: bytes
    name: str
    remedy: str
    offset: int = 0


_UNPACK = "unpack it first"
_CONVERT = "write its rows as tab-separated text or as Parquet"
_KINDS = (
    _Kind(b"\xff\xfe\0\0", "UTF-32 text", "convert it: `iconv -f UTF-32 -t UTF-8 FILE`"),
    _Kind(b"\0\0\xfe\xff", "UTF-32 text", "convert it: `iconv -f UTF-32 -t UTF-8 FILE`"),
    _Kind(b"\xff\xfe", "UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 FILE`"),
    _Kind(b"\xfe\xff", "UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 FILE`"),
    _Kind(b"\xef\xbb\xbf", "text that begins with a byte order mark (BOM)", "cut it off: `tail -c +4 FILE`"),
    _Kind(b"PK\3\4", "a zip archive", f"{_UNPACK}: `unzip FILE`"),
    _Kind(b"PK\5\6", "an empty zip archive", "fetch it again"),
    _Kind(b"BZh", "bzip2", f"{_UNPACK}: `bunzip2 FILE`"),
    _Kind(b"\xfd7zXZ\0", "xz", f"{_UNPACK}: `unxz FILE`"),
    _Kind(b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK}: `7z x FILE`"),
    _Kind(b"Rar!\x1a\7", "a rar archive", f"{_UNPACK}: `unrar x FILE`"),
    _Kind(b"\x04\x22\x4d\x18", "lz4", f"{_UNPACK}: `lz4 -d FILE`"),
    _Kind(b"\xff\6\0\0sNaPpY", "framed snappy", _UNPACK),
    _Kind(b"LZIP", "lzip", f"{_UNPACK}: `lzip -d FILE`"),
    _Kind(b"\x1f\x9d", "compress (.Z)", f"{_UNPACK}: `uncompress FILE`"),
    _Kind(b"\x89LZO", "lzop", f"{_UNPACK}: `lzop -d FILE`"),
    _Kind(b"ustar", "a tar archive", f"{_UNPACK}: `tar xf FILE`", 257),
    _Kind(b"Obj\1", "Avro", _CONVERT),
    _Kind(b"ORC", "ORC", _CONVERT),
    _Kind(b"ARROW1\0\0", "an Arrow (Feather) file", _CONVERT),
    _Kind(b"FEA1", "a Feather file", _CONVERT),
    _Kind(b"PARE", "an encrypted Parquet file", "decrypt it first"),
    _Kind(b"\x93NUMPY", "a NumPy array (.npy)", "torchrec's form is for train.py --dataset; encode takes raw days"),
    _Kind(b"\x89HDF\r\n\x1a\n", "HDF5", _CONVERT),
    _Kind(b"SQLite format 3\0", "an SQLite data base", _CONVERT),
    _Kind(b"%PDF", "a PDF document", "fetch the data itself"),
    _Kind(
        b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS, not the file itself",
        "fetch it: `git lfs pull`",
    ),
)  # fmt: skip
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}
_ONCE = {"gzip": "gunzip -c", "zstd": "zstd -dc"}
_AGAIN = "days are read more than once and from any place: write it to a file first, and name that"


def _text_kind(head: bytes) -> tuple[str, str] | None:
    """(name, remedy) of the first bytes of what is neither a day's text nor one of _KINDS; None where it may be one."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 3 > 3 * min(even, odd):
        order = "BE" if even > odd else "LE"
        return "UTF-16 text without a mark", f"convert it: `iconv -f UTF-16{order} -t UTF-8 FILE`"
    if any(line.count(b"\t") in SEPARATED for line in head.split(b"\n")):
        return None
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page (HTML), as of a failed download", "fetch the data itself"
    if start.startswith(b"<?xml"):
        return "XML, as of a failed download", "fetch the data itself"
    if start.startswith((b"{", b"[")):
        return "JSON", _CONVERT
    if b"\0" in head:
        return "binary data", "check which file was meant; records (.bin) are for train.py --dataset"
    first = head.partition(b"\n")[0]
    for separator, name in SEPARATORS.items():
        if first.count(separator) in SEPARATED:
            header, from_ = ("", "") if b"label" not in first.lower() else (" with a header", "tail -n +2 FILE | ")
            command = f"{from_}tr '{separator.decode()}' '\\t'" + ("" if from_ else " < FILE")
            return f"text whose fields are separated by {name}{header}", f"convert it: `{command}`"
    return None


def _inflated(path: Path, packed: str) -> bytes:
    """The first bytes of the text of a packed file; none where it is damaged, which its reader tells."""
    try:
        with open(path, "rb") as stored:
            if packed == "gzip":
                return codecs.read_gzip(io.BufferedReader(stored)).read(HEAD_BYTES)
            return codecs.zstd_frame().decompress(stored.read(PIECE_BYTES))[:HEAD_BYTES]
    except (*codecs.ERRORS, OverflowError, OSError):
        return b""


def check(path: Path, packed: str | None) -> None:
    """Raise DataError where a day file, or the text in it, is of another kind: by its first bytes, and never where one
    of its first rows has as many fields as a row of a day.

    packed: "gzip" or "zstd", as the file is packed, or None.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    inside = f" inside {packed}" if packed else ""
    if packed:
        head = _inflated(path, packed)
        for magic, name in _PACKED.items():
            if head.startswith(magic):
                once = f"{_ONCE[packed]} {path.name} > NEW"
                raise DataError(f"{path}: {EXPECTED}, found {name} inside {packed}; unpack it once: `{once}`")
    kind = next((kind for kind in _KINDS if head.startswith(kind.magic, kind.offset)), None)
    name, remedy = (kind.name, kind.remedy) if kind else _text_kind(head) or ("", "")
    if name:
        raise DataError(f"{path}: {EXPECTED}, found {name}{inside}; {remedy.replace('FILE', path.name)}")


def no_file(path: Path) -> str:
    """Words for what there is in place of a file, with what to do where that says something."""
    if str(path) == "-" and not path.exists():
        return "-, which stands for no file here; " + _AGAIN
    if not path.exists():
        return f"a link that leads nowhere ({path.readlink()})" if path.is_symlink() else "nothing"
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe; " + _AGAIN
    return ("a socket; " if stat.S_ISSOCK(mode) else "a device; ") + _AGAIN
