"""CRC-32 of runs of bytes from their single ones."""

import numpy as np

from gpu_etl.common.jit import compiled

POLYNOMIAL = 0xEDB88320  # of IEEE 802.3, its bits reversed: the highest bit stands for x^0
ONE = 0x80000000


@compiled
def _times(a, b):
    """The product of two polynomials over GF(2), modulo POLYNOMIAL."""
    product = 0
    while b:
        if b & ONE:
            product ^= a
        b = b << 1 & 0xFFFFFFFF
        a = a >> 1 ^ (POLYNOMIAL if a & 1 else 0)
    return product


@compiled
def _power(size):
    """x^(8 size), by squaring: a product with it moves a CRC up by so many bytes (as in zlib's crc32_combine)."""
    power, square = ONE, ONE >> 8  # x^0 and x^8
    while size:
        if size & 1:
            power = _times(power, square)
        square = _times(square, square)
        size >>= 1
    return power


def combine(first: int, second: int, size: int) -> int:
    """CRC-32 of bytes with the CRC `first`, followed by `size` bytes with the CRC `second`."""
    return int(_times(first, _power(size)) ^ second)


@compiled
def combine_pieces(crcs, piece, size):
    """CRC-32 of `size` bytes from those of its pieces, uint32 [n]: `piece` bytes each, the last one what is left."""
    found, power = 0, _power(piece)
    for i in range(len(crcs)):
        if i == len(crcs) - 1:
            power = _power(size - i * piece)
        found = _times(found, power) ^ np.int64(crcs[i])
    return found


def table() -> np.ndarray:
    """The remainder of each byte, uint32 [256]: crc = table[(crc ^ byte) & 255] ^ crc >> 8."""
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = found >> 1 ^ np.where(found & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return found
