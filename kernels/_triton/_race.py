"""The race that draws a token, inside the Triton kernels of sample: noise, and who is ahead."""

from __future__ import annotations

import triton
import triton.language as tl

# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
# exp(d) below it wins no race: E / exp(d) is at most 22.9 for the largest logit, E at least 2^-33
HOPELESS = tl.constexpr(1e-18)
LOG2E = tl.constexpr(1.4426950408889634)
LOG1P = (
    -0.500002384185791,
    0.33330854773521423,
    -0.24976040422916412,
    0.20085856,
    -0.17363739,
    0.14275685,
    -0.068338864,
)
# log(1 + f) / f = 1 + P1 f + ... on [-1/4, 1/2], to 2.4e-7
P1, P2, P3, P4, P5, P6, P7 = (tl.constexpr(p) for p in LOG1P)


@triton.jit
def unit_exponential(word):  # type: ignore[no-untyped-def]
    """-log(1 - u), u = (word + 1/2) 2^-32, to 1e-6 of itself: 1 - u = 2^n (1 + f), and f = -u to the last bit
    where n = 0.
    """
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = tl.fma((~word).to(tl.float32), 2.0**-32, 2.0**-33).to(tl.int32, bitcast=True)
    n = (bits - 0x3F400000) >> 23  # 1 + f is in [3/4, 3/2)
    f = tl.where(n == 0, -u, (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0)
    q = tl.fma(f, P7, P6)  # log(1 + f) / f
    q = tl.fma(f, q, P5)
    q = tl.fma(f, q, P4)
    q = tl.fma(f, q, P3)
    q = tl.fma(f, q, P2)
    q = tl.fma(f, q, P1)
    q = tl.fma(f, q, 1.0)
    return tl.fma(n.to(tl.float32), -0.6931471805599453, -f * q)


@triton.jit
def faster(e, p, v, e_other, p_other, v_other):  # type: ignore[no-untyped-def]
    """Of two tokens the one with the smaller e / p, the first of equals: its e, its p and itself."""
    other = e_other * p < e * p_other
    return tl.where(other, e_other, e), tl.where(other, p_other, p), tl.where(other, v_other, v)


@triton.jit
def fastest(e, p, token):  # type: ignore[no-untyped-def]
    """Of the lanes' winners the least e / p, and its token, the first of equals."""
    cost = e / tl.maximum(p, HOPELESS)
    least = tl.min(cost, 0)
    return least, tl.min(tl.where(cost == least, token, 2147483647), 0)


@triton.jit
def quarters(x, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 0, 1, 2 and 3 of every four neighbours."""
    even, odd = tl.split(tl.reshape(x, (N, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def first_of(row, start, end, value, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first index in [start, end) of a logit that is not below `value`; end - 1 where there is none."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), 2147483647, tl.int32)
    for v in range(start, end, BLOCK):
        x = tl.maximum(tl.load(row + v + lane, v + lane < end, float("-inf")).to(tl.float32), LOWEST)
        found = tl.minimum(found, tl.where(x >= value, v + lane, 2147483647))
    return tl.minimum(tl.min(found, 0), end - 1)
