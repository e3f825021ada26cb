"""CRC-32 of runs of bytes put together."""

import zlib

import numpy as np
import pytest

from gpu_etl.crc import combine


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (0, 7), (3, 1), (100, 12345), (1000, 1 << 20)])
def test_combine(first, second):
    data = np.random.default_rng(first).bytes(first + second)
    assert combine(zlib.crc32(data[:first]), zlib.crc32(data[first:]), second) == zlib.crc32(data)
