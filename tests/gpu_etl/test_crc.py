"""CRC-32 of runs of bytes put together."""

import zlib

import numpy as np
import pytest

from gpu_etl.common.crc import combine, combine_pieces, table


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (0, 7), (3, 1), (100, 12345), (1000, 1 << 20)])
def test_combine(first, second):
    data = np.random.default_rng(first).bytes(first + second)
    assert combine(zlib.crc32(data[:first]), zlib.crc32(data[first:]), second) == zlib.crc32(data)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1234])
def test_combine_pieces(size):
    data = np.random.default_rng(size).bytes(size)
    crcs = np.array([zlib.crc32(data[i : i + 100]) for i in range(0, size, 100)], np.uint32)
    assert combine_pieces(crcs, 100, size) == zlib.crc32(data)


def test_the_table_is_that_of_single_bytes():
    crcs = [int(table()[0xFF ^ byte]) ^ 0x00FFFFFF ^ 0xFFFFFFFF for byte in range(256)]
    assert crcs == [zlib.crc32(bytes([byte])) for byte in range(256)]
