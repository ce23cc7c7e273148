"""What the kernels of policy_loss do with one block of tokens: its terms, their derivatives, and its sums.

A block is (ROWS, 4): four neighbouring tokens, 16 bytes of each vector, for each thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrl.kernels._triton import surrogates


@triton.jit
def tokens_of(first, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of a block's tokens, (ROWS, 4)."""
    return first + (tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def count(x):  # type: ignore[no-untyped-def]
    """How many of each row are true, (ROWS,)."""
    return tl.sum(tl.where(x, 1.0, 0.0), 1)


@triton.jit
def _column(vector, at, inside, live):  # type: ignore[no-untyped-def]
    """A block of a vector, 0 where a token is masked out or beyond the last."""
    return tl.where(live, tl.load(vector + at, inside, 0.0), 0.0)


@triton.jit
def block_sums(  # type: ignore[no-untyped-def]
    first,
    vectors,
    dlogp,
    dentropy,
    T,
    kl_coef,
    entropy_coef,
    params,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    REF: tl.constexpr,
    CORRECTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASK: tl.constexpr,
    SEQUENCE: tl.constexpr,
    WITHIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the derivatives of one block, and return its sums, (ROWS,) each, in the order of METRICS with the
    loss at the end.  WITHIN: all of its tokens are below T.
    """
    logp, old_logp, advantage, weight, ref_logp, correction, entropy, mask, mean = vectors
    at = tokens_of(first, ROWS)
    inside = tl.full((ROWS, 4), 1, tl.int1)  # known when it is compiled: no access is masked
    if not WITHIN:
        inside = at < T
    live = inside
    if MASK:
        live = inside & (tl.load(mask + at, inside, 0) != 0)
    p = _column(logp, at, inside, live)
    a = _column(advantage, at, inside, live)
    w = _column(weight, at, inside, live)

    token_d = p - _column(old_logp, at, inside, live)
    d = surrogates.bounded(token_d)
    token_r, old_k3 = surrogates.exp_and_rest(d)
    old_k3 += d - token_d  # 0 unless the bound holds
    r = token_r
    if SEQUENCE:
        d = surrogates.bounded(_column(mean, at, inside, live))
        r, _ = surrogates.exp_and_rest(d)

    value, slope, low, high, cap = SURROGATE(d, r, p, a, params[0], params[1], params[2])
    r = tl.where(live, r, 0.0)
    importance = r
    if CORRECTION:
        k = _column(correction, at, inside, live)
        value, slope, importance = value * k, slope * k, r * k
    value, slope = -value, -slope

    e, k3, h = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
    if REF:
        e = p - _column(ref_logp, at, inside, live)
        back = surrogates.bounded(-e)
        _, rest = surrogates.exp_and_rest(back)
        k3 = rest + (back + e)
        if KL is not None:
            kl, kl_slope = KL(e, rest + back, k3, token_r)
            value, slope = value + kl_coef * kl, slope + kl_coef * kl_slope
    if ENTROPY:
        h = _column(entropy, at, inside, live)
        # with a coefficient of 0 the entropy is only reported
        value = tl.where(entropy_coef != 0.0, value - entropy_coef * h, value)
        tl.store(dentropy + at, w * -entropy_coef, inside)
    tl.store(dlogp + at, slope * w, inside)

    approx_kl, squared, loss = 0.5 * token_d * token_d, importance * importance, value * w
    tokens = (count(live), count(live & low), count(live & high), count(live & cap))
    drift = (tl.sum(r, 1), tl.max(r, 1), tl.sum(approx_kl, 1), tl.sum(-token_d, 1), tl.sum(old_k3, 1))
    means = (tl.sum(e, 1), tl.sum(k3, 1), tl.sum(h, 1), tl.sum(a, 1))
    return tokens + drift + means + (tl.sum(importance, 1), tl.sum(squared, 1), tl.sum(loss, 1))


@triton.jit
def merge(x, y):  # type: ignore[no-untyped-def]
    """The sums of two blocks together; number 5 is a maximum."""
    return (
        x[0] + y[0],
        x[1] + y[1],
        x[2] + y[2],
        x[3] + y[3],
        x[4] + y[4],
        tl.maximum(x[5], y[5]),
        x[6] + y[6],
        x[7] + y[7],
        x[8] + y[8],
        x[9] + y[9],
        x[10] + y[10],
        x[11] + y[11],
        x[12] + y[12],
        x[13] + y[13],
        x[14] + y[14],
        x[15] + y[15],
    )
