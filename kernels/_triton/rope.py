"""rope in Triton: queries and keys, with an optional norm of each head, in one launch.

Queries and keys may be views of one fused projection: they are read in place.  A program takes one token and
some of its heads, queries before keys, so that the angles are loaded once; each head lies in registers as its
two halves.  The backward without a norm is the forward with the opposite sense.  With a norm, a wave of
programs walks over the tokens, and each keeps its own sums for the two norm weights, which are added in a
fixed order (_partials.py).

STORE: the same launch copies each token's turned key and its value into paged caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows
from fastrl.kernels._triton._heads import (
    angles,
    inverse_rms,
    load_heads,
    norm_weights,
    normed_by,
    store_heads,
)
from fastrl.kernels._triton._partials import combine, programs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = 16  # of a program, at most
PROGRAMS = 12  # of a wave on a multiprocessor: two warps each, 4 KB of loads in flight


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["N"])
def turn_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    yq,
    yk,
    v,
    k_cache,
    v_cache,
    slots,
    N,
    H,
    K,
    half,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    eps,
    sense,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    STORE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    blocks = tl.cdiv(H + K, HEADS)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS))[:, None]
    key, is_query = head - H, head < H
    lane = tl.arange(0, HALF)[None, :]
    ok = (head < H + K) & (lane < half)
    c, s = angles(positions, cos, sin, t, N, half, lane)
    xq, xk = q + t * q_token + head * q_head + lane, k + t * k_token + key * k_head + lane
    a, b = load_heads(xq, xk, is_query, ok), load_heads(xq + half, xk + half, is_query, ok)
    if Q_NORM or K_NORM:
        r = inverse_rms(a, b, half, eps)
        na = normed_by(a, r, norm_weights(q_norm, k_norm, lane, lane < half, is_query, Q_NORM, K_NORM), q)
        nb = normed_by(
            b, r, norm_weights(q_norm, k_norm, half + lane, lane < half, is_query, Q_NORM, K_NORM), q
        )
        normed = (is_query & Q_NORM) | (~is_query & K_NORM)
        a, b = tl.where(normed, na, a), tl.where(normed, nb, b)
    s = s * sense
    first, second = (a * c - b * s).to(yq.dtype.element_ty), (b * c + a * s).to(yq.dtype.element_ty)
    to_q, to_k = yq + (t * H + head) * 2 * half + lane, yk + (t * K + key) * 2 * half + lane
    store_heads(to_q, to_k, first, is_query, ok)
    store_heads(to_q + half, to_k + half, second, is_query, ok)
    if STORE:
        ok = ok & (head >= H)
        to = (tl.load(slots + t).to(tl.int64) * K + key) * 2 * half + lane
        value = v + t * v_token + key * v_head + lane
        tl.store(k_cache + to, first, ok)
        tl.store(k_cache + to + half, second, ok)
        tl.store(v_cache + to, tl.load(value, ok, 0.0), ok)
        tl.store(v_cache + to + half, tl.load(value + half, ok, 0.0), ok)


@triton.jit(do_not_specialize=["T", "N"])
def backward_kernel(  # type: ignore[no-untyped-def]
    gq,
    gk,
    q_partials,
    k_partials,
    dq,
    dk,
    q,
    k,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    T,
    N,
    H,
    K,
    half,
    dq_token,
    dq_head,
    dk_token,
    dk_head,
    q_token,
    q_head,
    k_token,
    k_head,
    eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    blocks = tl.cdiv(H + K, HEADS)
    p = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS))[:, None]
    key, is_query = head - H, head < H
    lane = tl.arange(0, HALF)[None, :]
    live = lane < half
    ok = (head < H + K) & live
    normed = (is_query & Q_NORM) | (~is_query & K_NORM)
    wa = norm_weights(q_norm, k_norm, lane, live, is_query, Q_NORM, K_NORM)
    wb = norm_weights(q_norm, k_norm, half + lane, live, is_query, Q_NORM, K_NORM)
    sum_a, sum_b = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    t = p // blocks
    while t < T:
        c, s = angles(positions, cos, sin, t, N, half, lane)
        uq, uk = dq + t * dq_token + head * dq_head + lane, dk + t * dk_token + key * dk_head + lane
        xq, xk = q + t * q_token + head * q_head + lane, k + t * k_token + key * k_head + lane
        u, w = load_heads(uq, uk, is_query, ok), load_heads(uq + half, uk + half, is_query, ok)
        a, b = (
            load_heads(xq, xk, is_query, ok & normed),
            load_heads(xq + half, xk + half, is_query, ok & normed),
        )
        da, db = u * c + w * s, w * c - u * s  # turned back
        r = inverse_rms(a, b, half, eps)
        na, nb, ga, gb = a * r, b * r, da * wa, db * wb
        sum_a += tl.where(ok, da * na, 0.0)  # the angles are NaN past the head's width
        sum_b += tl.where(ok, db * nb, 0.0)
        mean = tl.sum(tl.where(ok, ga * na + gb * nb, 0.0), 1)[:, None] / (2 * half)
        to_q, to_k = gq + (t * H + head) * 2 * half + lane, gk + (t * K + key) * 2 * half + lane
        store_heads(to_q, to_k, tl.where(normed, (ga - na * mean) * r, da), is_query, ok)
        store_heads(to_q + half, to_k + half, tl.where(normed, (gb - nb * mean) * r, db), is_query, ok)
        t += tl.num_programs(0) // blocks
    e = tl.arange(0, HALF)
    if Q_NORM:
        tl.store(q_partials + p * 2 * half + e, tl.sum(tl.where(is_query, sum_a, 0.0), 0), e < half)
        tl.store(q_partials + p * 2 * half + half + e, tl.sum(tl.where(is_query, sum_b, 0.0), 0), e < half)
    if K_NORM:
        tl.store(k_partials + p * 2 * half + e, tl.sum(tl.where(is_query, 0.0, sum_a), 0), e < half)
        tl.store(k_partials + p * 2 * half + half + e, tl.sum(tl.where(is_query, 0.0, sum_b), 0), e < half)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q (T, H, E) and k (T, K, E), turned."""
    return _turn(q, k, positions, cos, sin, q_norm, k_norm, eps, 1.0)


def store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, with k and v copied to the `slots` of the caches (slots, K, E), which are contiguous."""
    return _turn(
        q,
        k,
        positions,
        cos,
        sin,
        q_norm,
        k_norm,
        eps,
        1.0,
        (unit_rows(v), k_cache, v_cache, slots.contiguous()),
    )


def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and of the two norm weights (empty without one)."""
    norms = q_norm.numel() > 0, k_norm.numel() > 0
    if not any(norms) or not dq.numel():
        gq, gk = _turn(dq, dk, positions, cos, sin, q_norm[:0], k_norm[:0], eps, -1.0)
        return gq, gk, torch.zeros_like(q_norm), torch.zeros_like(k_norm)
    (T, H, E), K = dq.shape, dk.shape[1]
    dq, dk = unit_rows(dq), unit_rows(dk)
    q, k = (unit_rows(x) if used else d for x, d, used in zip((q, k), (dq, dk), norms, strict=True))
    gq, gk = (torch.empty(d.shape, dtype=d.dtype, device=d.device) for d in (dq, dk))
    tile = _tile(H + K, E)
    blocks = triton.cdiv(H + K, tile["HEADS"])
    P = blocks * programs(dq, T, max(1, PROGRAMS // blocks))
    partials = [torch.empty(P if used else 0, E, dtype=torch.float32, device=dq.device) for used in norms]
    strides = [x.stride(i) for x in (dq, dk, q, k) for i in (0, 1)]
    with on_device(dq):
        backward_kernel[(P,)](
            gq,
            gk,
            *partials,
            dq,
            dk,
            q,
            k,
            positions.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            q_norm.contiguous(),
            k_norm.contiguous(),
            T,
            cos.shape[0],
            H,
            K,
            E // 2,
            *strides,
            eps,
            Q_NORM=norms[0],
            K_NORM=norms[1],
            **tile,
        )
    wq, wk = (
        combine(part, w.dtype) if used else w.new_empty(0)
        for part, w, used in zip(partials, (q_norm, k_norm), norms, strict=True)
    )
    return gq, gk, wq, wk


def _turn(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    sense: float,
    cache: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    q, k = unit_rows(q), unit_rows(k)
    (T, H, E), K = q.shape, k.shape[1]
    yq, yk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    v, k_cache, v_cache, slots = cache or (k, k, k, positions)
    tile = _tile(H + K, E)
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
    if T and H + K and E:
        with on_device(q):
            turn_kernel[(T * triton.cdiv(H + K, tile["HEADS"]),)](
                q,
                k,
                positions.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                q_norm.contiguous(),
                k_norm.contiguous(),
                yq,
                yk,
                v,
                k_cache,
                v_cache,
                slots,
                cos.shape[0],
                H,
                K,
                E // 2,
                *strides,
                eps,
                sense,
                Q_NORM=q_norm.numel() > 0,
                K_NORM=k_norm.numel() > 0,
                STORE=cache is not None,
                **tile,
            )
    return yq, yk


def _tile(heads: int, E: int) -> dict[str, int]:
    """Heads of a program, so that the last has few to spare, and warps for 16 bytes of bf16 a thread from
    each half.
    """
    count = min((HEADS, HEADS // 2, HEADS // 4), key=lambda n: -(-heads // n) * n)
    half = max(8, triton.next_power_of_2(E // 2))
    return {
        "HEADS": count,
        "HALF": half,
        "num_warps": max(1, min(8, count * half // 256)),
        "enable_fp_fusion": True,
    }
