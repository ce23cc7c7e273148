"""What the linear_logp kernels in registers do with a tile of logits: five instructions a logit.

    x = z k - c      e = 2^x      s += e      a += e x          k = log2(e) / tau,  c = top k, rounded

The exponent is one fused multiply-add: `c`, and not the largest logit itself, is what the sums are relative
to, so that rounding it costs nothing; `finish` refers them to the largest logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fold(z, top, c, s, a, k, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile (tokens, columns) to the running maximum, reference point and sums of its tokens."""
    high = tl.maximum(top, tl.max(z, 1))
    # nothing above -inf yet: any reference point gives sums of 0, and the first logit replaces it
    point = tl.where(high <= LOWEST, 0.0, high * k)
    shrink = tl.where(top <= LOWEST, 0.0, tl.exp2(c - point))
    x = tl.fma(z, tl.broadcast_to(k[:, None], z.shape), tl.broadcast_to(-point[:, None], z.shape))
    e = tl.exp2(x)
    if ENTROPY:
        a = shrink * (a + (c - point) * s) + tl.sum(e * x, 1)
    s = shrink * s + tl.sum(e, 1)
    return high, point, s, a


@triton.jit
def finish(top, c, s, a, k, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """s = sum exp((z - top) / tau) and a = sum exp((z - top) / tau) (z - top), from sums relative to c."""
    rest = tl.where(top <= LOWEST, 0.0, tl.fma(top, k, -c))  # what rounding left of c
    back = tl.exp2(-rest)
    if ENTROPY:
        a = back * (a - rest * s) / k
    return back * s, a
