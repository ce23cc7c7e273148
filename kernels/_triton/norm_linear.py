"""The two products of a decode step that read the normed residual stream, with what follows each of them.

    heads    norm, qkv + bias, norms of query and key heads, rope; keys and values go to their pages
    gated    norm, gate_up, silu(gate) up

A program computes two blocks of LANES columns that belong together: the two halves of a head that rope mixes,
or gate and up.  A head with a norm is one program's; other heads may be cut.  The tile follows from the
number of rows: a few rows read the weights once and want many programs, many rows want large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrl.kernels._triton._chain import after_others
from fastrl.kernels._triton._heads import angles, inverse_rms, norm_weights, normed_by
from fastrl.kernels._triton._rows import inverse_of, rounded, two_products

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def biased(x, bias, at, live, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    if BIAS:
        x += tl.load(bias + at, live, 0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["M", "N", "parts"])
def heads_kernel(  # type: ignore[no-untyped-def]
    q,
    k_cache,
    v_cache,
    h,
    squares,
    norm,
    weight,
    bias,
    q_norm,
    k_norm,
    positions,
    cos,
    sin,
    slots,
    M,
    N,
    parts,
    D,
    H,
    K,
    half,
    eps,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    after_others(CHAIN)
    down, each = tl.cdiv(M, BLOCK_M), tl.cdiv(half, LANES)
    tile = tl.program_id(0) // down
    head, lane = tile // each, tile % each * LANES + tl.arange(0, LANES)
    m, live = tl.program_id(0) % down * BLOCK_M + tl.arange(0, BLOCK_M), lane < half
    first = head * 2 * half + lane
    inverse = inverse_of(squares, m, M, parts, D, eps, PARTS)
    a, b = two_products(
        h, inverse, norm, weight, m, M, D, first, first + half, live, BLOCK_M, LANES, BLOCK_K, CHAIN
    )
    a = rounded(biased(a, bias, first, live, BIAS), q)
    b = rounded(biased(b, bias, first + half, live, BIAS), q)
    row, lane = tl.minimum(m, M - 1).to(tl.int64)[:, None], lane[None, :]  # rows past the end are not stored
    if head < H + K:
        if NORMS:
            r, query, inside = inverse_rms(a, b, half, eps), head < H, lane < half
            a = normed_by(a, r, norm_weights(q_norm, k_norm, lane, inside, query, True, True), q)
            b = normed_by(b, r, norm_weights(q_norm, k_norm, half + lane, inside, query, True, True), q)
        c, s = angles(positions, cos, sin, row, N, half, lane)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    ok = (m < M)[:, None] & (lane < half)
    if head < H:
        store_halves(q + (row * H + head) * 2 * half + lane, a, b, half, ok)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        if head < H + K:
            store_halves(k_cache + (slot * K + head - H) * 2 * half + lane, a, b, half, ok)
        else:
            store_halves(v_cache + (slot * K + head - H - K) * 2 * half + lane, a, b, half, ok)


@triton.jit
def store_halves(to, a, b, half, ok):  # type: ignore[no-untyped-def]
    tl.store(to, a.to(to.dtype.element_ty), ok)
    tl.store(to + half, b.to(to.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["M", "parts"])
def gated_kernel(  # type: ignore[no-untyped-def]
    y,
    h,
    squares,
    norm,
    weight,
    M,
    parts,
    D,
    F,
    eps,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    after_others(CHAIN)
    down = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % down * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(0) // down * LANES + tl.arange(0, LANES)
    inverse = inverse_of(squares, m, M, parts, D, eps, PARTS)
    gate, up = two_products(
        h, inverse, norm, weight, m, M, D, f, F + f, f < F, BLOCK_M, LANES, BLOCK_K, CHAIN
    )
    gate, up = rounded(gate, y), rounded(up, y)
    out = gate / (1.0 + tl.exp2(-gate * LOG2E)) * up
    to = y + m.to(tl.int64)[:, None] * F + f[None, :]
    tl.store(to, out.to(y.dtype.element_ty), (m < M)[:, None] & (f < F)[None, :])
