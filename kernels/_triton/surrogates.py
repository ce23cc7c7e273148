"""The surrogates and KL estimators of policy_loss as device functions: one for each row of SURROGATES and of
KLS, and the exponential that they share.

A surrogate takes d and r as the formula sees them, logp, the advantage, and the row's parameters in order,
padded with 0 to three.  It returns the value, the derivative, and whether the token is held at the lower
bound, at the upper bound, at the cap.  A KL takes e, x = exp(-e) - 1, k3 = x + e and the token's own r; it
returns the value and the derivative.
"""

from __future__ import annotations

import triton
import triton.language as tl

BOUND = tl.constexpr(20.0)  # EXPONENT of the tables
LOG2E = tl.constexpr(1.4426950408889634)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves round(x) in the low bits
LN2_HIGH = tl.constexpr(0.693359375)  # exact in its product with an exponent
LN2_LOW = tl.constexpr(-2.12194440e-4)


# --- the exponential --------------------------------------------------------------------------------
@triton.jit
def exp_and_rest(x):  # type: ignore[no-untyped-def]
    """exp(x) and exp(x) - 1 - x for |x| < 87, both without loss of digits; the numbers are those of
    csrc/cpu/vec.h.

    x = n ln 2 + r, exp(r) = 1 + r + r^2 q(r).  Near 0 the rest is r^2 q(r) itself, where a difference would
    leave nothing.
    """
    n = (x * LOG2E + MAGIC) - MAGIC
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    q = 1.381454058e-3 * r + 8.368745446e-3
    q = (q * r + 4.166838899e-2) * r + 1.666652113e-1
    q = q * r + 4.999999404e-1
    tail = q * (r * r)
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    above = scale - 1.0
    rest = tail * scale + (above * r + ((above - n * LN2_HIGH) - n * LN2_LOW))
    return (tail + r) * scale + scale, rest


@triton.jit
def bounded(x):  # type: ignore[no-untyped-def]
    """x within +-20; NaN for an infinity, as for NaN."""
    return tl.minimum(tl.maximum(x, -BOUND), BOUND) + (x - x)


@triton.jit
def _within(x, low, high):  # type: ignore[no-untyped-def]
    """clamp, with NaN kept."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


# --- surrogates -------------------------------------------------------------------------------------
@triton.jit
def nll(d, r, logp, advantage, p, q, s):  # type: ignore[no-untyped-def]
    never = d < d
    return logp, tl.full(logp.shape, 1.0, tl.float32), never, never, never


@triton.jit
def pg(d, r, logp, advantage, p, q, s):  # type: ignore[no-untyped-def]
    never = d < d
    return advantage * logp, advantage, never, never, never


@triton.jit
def ratio(d, r, logp, advantage, p, q, s):  # type: ignore[no-untyped-def]
    never = d < d
    return r * advantage, r * advantage, never, never, never


@triton.jit
def clip(d, r, logp, advantage, low, high, cap):  # type: ignore[no-untyped-def]
    bottom, top = 1.0 - low, 1.0 + high
    free = tl.where(r > cap, cap, r) * advantage
    held = _within(r, bottom, top) * advantage
    worse, better = advantage < 0.0, advantage > 0.0
    below, above, capped = worse & (r < bottom), better & (r > top), worse & (r > cap)
    return (
        tl.where(free < held, free, held),
        tl.where(below | above | capped, 0.0, r * advantage),
        below,
        above,
        capped,
    )


@triton.jit
def cispo(d, r, logp, advantage, low, high, s):  # type: ignore[no-untyped-def]
    weight = _within(r, low, high) * advantage
    return weight * logp, weight, r < low, r > high, d < d


@triton.jit
def sapo(d, r, logp, advantage, pos, neg, s):  # type: ignore[no-untyped-def]
    never = d < d
    tau = tl.where(advantage > 0.0, pos, neg)
    y = tau * (r - 1.0)
    small, _ = exp_and_rest(tl.maximum(-tl.abs(y), -87.0) + (y - y))  # exp(-|y|)
    sigmoid = tl.div_rn(tl.where(y < 0.0, small, 1.0), 1.0 + small)
    slope = 4.0 * tl.div_rn(small, (1.0 + small) * (1.0 + small)) * r * advantage
    return tl.div_rn(4.0, tau) * sigmoid * advantage, slope, never, never, never


@triton.jit
def dro(d, r, logp, advantage, beta, q, s):  # type: ignore[no-untyped-def]
    never = d < d
    return advantage * logp - 0.5 * beta * d * d, advantage - beta * d, never, never, never


@triton.jit
def luffy_off(d, r, logp, advantage, gamma, q, s):  # type: ignore[no-untyped-def]
    never = d < d
    p, _ = exp_and_rest(_within(logp, -87.0, 87.0))
    total = p + gamma
    return (
        tl.div_rn(advantage * p, total),
        tl.div_rn(advantage * gamma * p, total * total),
        never,
        never,
        never,
    )


# --- KL to the reference ----------------------------------------------------------------------------
@triton.jit
def _k1(e, x, k3, r):  # type: ignore[no-untyped-def]
    return e, tl.full(e.shape, 1.0, tl.float32)


@triton.jit
def _k2(e, x, k3, r):  # type: ignore[no-untyped-def]
    return 0.5 * e * e, e


@triton.jit
def _k3(e, x, k3, r):  # type: ignore[no-untyped-def]
    return k3, -x


@triton.jit
def _k3_plus(e, x, k3, r):  # type: ignore[no-untyped-def]
    return k3, e


@triton.jit
def _k1_is(e, x, k3, r):  # type: ignore[no-untyped-def]
    return r * e, r * (1.0 + e)


@triton.jit
def _k3_is(e, x, k3, r):  # type: ignore[no-untyped-def]
    return r * k3, r * e


@triton.jit
def _absolute(e, x, k3, r):  # type: ignore[no-untyped-def]
    return tl.abs(e), tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e))


@triton.jit
def _k3_cut(e, x, k3, r):  # type: ignore[no-untyped-def]
    far = k3 > 10.0
    return tl.where(far, 10.0, k3), tl.where(far, 0.0, -x)


@triton.jit
def _k3_plus_cut(e, x, k3, r):  # type: ignore[no-untyped-def]
    near = tl.minimum(k3, 10.0, propagate_nan=tl.PropagateNan.ALL)
    return near, tl.where(near < k3, 0.0, e)


KLS = {
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k3+": _k3_plus,
    "k1_is": _k1_is,
    "k3_is": _k3_is,
    "abs": _absolute,
    "k3_cut": _k3_cut,
    "k3+_cut": _k3_plus_cut,
}
