"""Headers of .npy files from outside: each is read, or refused in words."""

import struct

import numpy as np
import pytest

from gpu_etl.errors import DataError
from gpu_etl.load.npy import _Array

HEADER = "{'descr': %s, 'fortran_order': %s, 'shape': %s, }\n"


def file_of(header, version=(1, 0), data=bytes(104)):
    header = header if isinstance(header, bytes) else header.encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + data


def header(descr="'<f4'", fortran="False", shape="(2, 13)"):
    return HEADER % (descr, fortran, shape)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_is_read(tmp_path, version):
    numbers = np.arange(26, dtype=np.float32).reshape(2, 13)
    (tmp_path / "a.npy").write_bytes(file_of(header(), version, numbers.tobytes()))
    array = _Array(tmp_path / "a.npy", 13, ("f",))
    assert array.rows == 2 and (array.read(0, 2) == numbers).all()
    np.save(tmp_path / "b.npy", numbers)
    assert (_Array(tmp_path / "b.npy", 13, ("f",)).read(1, 2) == numbers[1:]).all()


@pytest.mark.parametrize(("content", "words"), [
    (b"", "a .npy file of version 1 to 3, got one that begins with b''"), (b"hello" * 30, "begins with b'hellohel'"),
    (file_of(header(), (4, 0)), "of version 1 to 3"), (file_of(header(), (0, 9)), "of version 1 to 3"),
    (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"x" * 99, "a header of at most 4096 bytes, got 4,294,967,295"),
    (file_of(" " * 20_000 + header()), "a header of at most 4096 bytes"), (file_of(header())[:40], "EOF: reading"),
    (file_of(header(shape="2")), "shape is not valid: 2"), (file_of(header(shape="[2, 13]")), "shape is not valid"),
    (file_of(header(shape="(-2, 13)")), r"got shape \(-2, 13\)"), (file_of(header(shape="()")), r"got shape \(\)"),
    (file_of(header(shape="(True, 13)"), data=bytes(52)), r"got shape \(True, 13\)"),
    (file_of(header(shape="(2.0, 13)")), "shape is not valid"),
    (file_of(header(shape=f"({2**62}, 13)")), "bytes by its header, found .*the file is cut off"),
    (file_of(header(), data=bytes(105)), "there is more behind its rows"),
    (file_of(header("'|O'")), "dtype f, got shape .* object"), (file_of(header("[('a', 'O')]")), "dtype f, got shape"),
    (file_of(header("[('a', '<f4')]")), "dtype f, got shape"),
    (file_of(header("('<f4', (13,))", shape="(2,)")), "dtype f, got shape"),
    (file_of(header("'zz'")), "not a valid dtype"), (file_of(header("'<i4'")), "dtype f, got shape .* int32"),
    (file_of(header(fortran="True")), "column after column"), (file_of(header(fortran="1")), "not a valid bool"),
    (file_of("{'descr'\n"), "the header of a .npy file: .*EOF"), (file_of("[" * 3000), "the header of a .npy file"),
    (file_of("-" * 4000 + "1"), "the header of a .npy file"),
    (file_of("(" * 2000 + ")" * 2000), "the header of a .npy"),
    (file_of(bytes(50)), "the header of a .npy file: .{1,120}$"), (file_of("5"), "not a dictionary"),
    (file_of("__import__('os').abort()"), "malformed node"),
    (file_of(b"\xff\xfe" * 30, (3, 0)), "the header of a .npy"),
])  # fmt: skip
def test_what_is_no_array_of_rows_is_refused(tmp_path, content, words):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)a\.npy: expected .*" + words):
        _Array(tmp_path / "a.npy", 13, ("f",))
