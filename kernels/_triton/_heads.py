"""The heads that a program of rope's kernels takes: queries first, then keys, each as its two halves.

Tensors over them are (HEADS, HALF), one for each half.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def angles(positions, cos, sin, t, N, half, lane):  # type: ignore[no-untyped-def]
    """cos and sin of token t, like `lane`; NaN for a position that the tables do not have."""
    at = tl.load(positions + t).to(tl.int64)
    ok = lane < tl.where((at >= 0) & (at < N), half, 0)
    row = at * half + lane
    c = tl.load(cos + row, ok, float("nan")).to(tl.float32)
    s = tl.load(sin + row, ok, float("nan")).to(tl.float32)
    return c, s


@triton.jit
def load_heads(of_query, of_key, is_query, ok):  # type: ignore[no-untyped-def]
    """Each head from its tensor; a select between pointers would hide their alignment from the compiler."""
    return tl.where(
        is_query,
        tl.load(of_query, ok & is_query, 0.0).to(tl.float32),
        tl.load(of_key, ok & ~is_query, 0.0).to(tl.float32),
    )


@triton.jit
def store_heads(of_query, of_key, x, is_query, ok):  # type: ignore[no-untyped-def]
    tl.store(of_query, x.to(of_query.dtype.element_ty), ok & is_query)
    tl.store(of_key, x.to(of_key.dtype.element_ty), ok & ~is_query)


@triton.jit
def norm_weights(q_norm, k_norm, lane, live, is_query, Q_NORM: tl.constexpr, K_NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm weight of each head at `lane`; 0 where there is none."""
    of_q, of_k = tl.zeros_like(lane).to(tl.float32), tl.zeros_like(lane).to(tl.float32)
    if Q_NORM:
        of_q = tl.load(q_norm + lane, live, 0.0).to(tl.float32)
    if K_NORM:
        of_k = tl.load(k_norm + lane, live, 0.0).to(tl.float32)
    return tl.where(is_query, of_q, of_k)


@triton.jit
def inverse_rms(a, b, half, eps):  # type: ignore[no-untyped-def]
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(a * a + b * b, 1)[:, None] / (2 * half) + eps))


@triton.jit
def normed_by(x, r, w, like):  # type: ignore[no-untyped-def]
    """Rounded before the weight, and after."""
    dtype = like.dtype.element_ty
    return ((x * r).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
