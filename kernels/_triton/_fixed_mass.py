"""Distances and masses of tokens without fp64, inside the Triton kernels of sample.

The definition (sample.py) keeps tokens by integer masses, floor(exp(d) 2^n) of an fp64 exp.  `mass` gives
them in fp32 and integers:

    exp(d) = 2^(k/4) exp(r)          k = round(4 d log2 e),  r = d - k log(2)/4,  |r| <= 0.087
    exp(r) = 1 + r + tail            tail = r^2/2 + r^3/6 + r^4/24 + r^5/120 + what r was rounded by

r is exact to 2^-48: k log(2)/4 is subtracted in two parts, the first of 12 bits and so without rounding, and
the rounding of the second enters the tail.  The tail is at most 0.004, so that its fp32 roundings, and the
terms left out, are below 2^-31 together.  The sum is formed in 32-bit fixed point, 2^(k/4) is one of four
31-bit constants and a shift.  Over every fp32 d in [-44, 0] the result is off by at most 1.5e-9 of the mass
plus one unit: less than 1 + 2^-29 mass.  Integer sums are the same in any order, so a sum of V masses is off
by at most V + 2^-29 of itself: `slack`.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 2^23: adding it rounds to an integer, which its low bits hold
ROUND_BITS = tl.constexpr(0x4B400000)
QUARTERS = tl.constexpr(5.770780163555854)  # 4 log2(e)
PART_HIGH, PART_LOW = tl.constexpr(0.1732940673828125), tl.constexpr(-7.272242783e-06)  # log(2) / 4
UNIT = tl.constexpr(2147483648.0)  # 1 in fixed point
POWER_0, POWER_1 = tl.constexpr(2147483648), tl.constexpr(2553802834)  # 2^(31 + j/4)
POWER_2, POWER_3 = tl.constexpr(3037000500), tl.constexpr(3611622603)
LEAST = tl.constexpr(-44.0)  # exp(d) 2^61 is less than 1 below -42.3


@triton.jit
def distance(x, top, tau, inverse):  # type: ignore[no-untyped-def]
    """(x - top) / tau, each operation rounded once; `inverse` is 1 / tau, rounded.

    Two steps of Newton's iteration with exact residuals round as the division does (Markstein 1990), as long
    as x - top is 0 or beyond 2e-31.
    """
    far = x - top
    q = far * inverse
    near = tl.fma(tl.fma(-tau, q, far), inverse, q)
    near = tl.fma(tl.fma(-tau, near, far), inverse, near)
    return tl.where(q < -3e38, q, near)  # the residual of an infinite quotient is no number


@triton.jit
def mass(d, bits):  # type: ignore[no-untyped-def]
    """floor(exp(d) 2^bits) for d <= 0 as int64, to 1 + 2^-29 of itself."""
    d = tl.maximum(d, LEAST)
    rounded = tl.fma(d, QUARTERS, ROUND)
    quarters = rounded - ROUND
    part = tl.fma(quarters, -PART_HIGH, d)
    r = tl.fma(quarters, -PART_LOW, part)
    lost = tl.fma(quarters, -PART_LOW, part - r)
    p = tl.fma(r, 0.008333333333333333, 0.041666666666666664)
    p = tl.fma(r, p, 0.16666666666666666)
    p = tl.fma(r, p, 0.5)
    tail = tl.fma(r * r, p, lost)
    fixed = (r * UNIT).to(tl.int32) + (tail * UNIT).to(tl.int32)
    number = fixed.to(tl.uint32, bitcast=True) ^ 0x80000000  # plus 1: the sum is less than 0.1
    k = rounded.to(tl.int32, bitcast=True) - ROUND_BITS
    even = tl.where((k & 2) != 0, POWER_2, POWER_0).to(tl.uint32)
    odd = tl.where((k & 2) != 0, POWER_3, POWER_1).to(tl.uint32)
    product = number.to(tl.uint64) * tl.where((k & 1) != 0, odd, even).to(tl.uint64)
    down = tl.minimum(62 - bits - (k >> 2), 63)
    return (product >> down.to(tl.uint64)).to(tl.int64)


@triton.jit
def slack(total, V):  # type: ignore[no-untyped-def]
    """What a sum of V masses, or the limit that is a part of it, may be off by."""
    return (total >> 29) + (total >> 50) + V + 4
