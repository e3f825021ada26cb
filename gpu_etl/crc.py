"""CRC-32 of two runs of bytes from their single ones (leaf)."""

POLYNOMIAL = 0xEDB88320  # of IEEE 802.3, its bits reversed: the highest bit stands for x^0
ONE = 0x80000000


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo POLYNOMIAL."""
    product = 0
    while b:
        if b & ONE:
            product ^= a
        b = b << 1 & 0xFFFFFFFF
        a = a >> 1 ^ (POLYNOMIAL if a & 1 else 0)
    return product


def combine(first: int, second: int, size: int) -> int:
    """CRC-32 of bytes with the CRC `first`, followed by `size` bytes with the CRC `second`.

    The first one moves up by size bytes, a product with x^(8 size), by squaring (zlib's crc32_combine does the same).
    """
    power, square = ONE, ONE >> 8  # x^0 and x^8
    while size:
        if size & 1:
            power = _times(power, square)
        square = _times(square, square)
        size >>= 1
    return _times(first, power) ^ second
