"""Products, sums and roundings that the kernels share.

Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers, and cuts where it should round;
INTERPRETED takes another way to the same numbers there.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b, float32; PRECISION: of float32 factors, "ieee" or "tf32"."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x as `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def not_finite(x):
    """Where float32 x is infinite or no number."""
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000


@triton.jit
def matrix_sum(chosen, x):
    """chosen bool [N, N] @ x [N, D] -> float32 [N, D], on the matrix units, no digit of x lost.

    A float32 number is the sum of three bfloat16 numbers, and products with 0 and 1 are exact in any type.
    """
    total = tl.zeros(x.shape, tl.float32)
    if x.dtype == tl.float32:
        chosen = chosen.to(tl.float32).to(tl.bfloat16)
        high = rounded(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rounded(rest, tl.bfloat16)
        low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
        total = dot(chosen, low, total, "ieee")
        total = dot(chosen, middle, total, "ieee")
        return dot(chosen, high, total, "ieee")
    return dot(chosen.to(tl.float32).to(x.dtype), x, total, "ieee")


@triton.jit
def random_bits(seed, place, COLUMNS: tl.constexpr):
    """16 random bits for each element of rows [N, COLUMNS], uint32, by Philox 4x32 (Salmon et al. 2011).

    place int64 [N, 1]: number of the row; a number of a row and a seed always give the same bits. Seven rounds, the
    fewest that pass BigCrush by that paper; a call gives the bits of eight elements.
    """
    group = tl.arange(0, COLUMNS // 8)[None, :]
    a, b, c, d = tl.randint4x(seed, place * (COLUMNS // 8) + group, n_rounds=7)
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (place.shape[0], COLUMNS))


@triton.jit
def stochastically_rounded(x, bits, dtype: tl.constexpr):
    """float32 x as bfloat16 or float16: one of its two neighbours, each the likelier the nearer it is; bits: uint32, 16
    random bits. As optimizers.stochastically_rounded."""
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    LEAST: tl.constexpr = 2.0**-126 if dtype == tl.bfloat16 else 2.0**-24
    DIGITS: tl.constexpr = 23 - MANTISSA
    power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = tl.maximum(power * 2.0**-MANTISSA, LEAST)
    inverse = (0x7F000000 - spacing.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    fraction = (bits & ((1 << DIGITS) - 1)).to(tl.float32) * 2.0**-DIGITS
    return (tl.floor(x * inverse + fraction) * spacing).to(dtype)
