"""rope on CPU: csrc/cpu/rope.cpp, which takes addresses and strides, fp32 tables and fp32 norm weights.

It checks every position and slot before it reads or writes through any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, address, unit_rows

Cache = tuple[Tensor, Tensor, Tensor, Tensor]  # v, k_cache, v_cache, slots
NO_CACHE = (0,) * 7


def _wide(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _heads(x: Tensor) -> tuple[int, int, int]:
    """Address, and strides of a token and of a head."""
    return x.data_ptr(), x.stride(0), x.stride(1)


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
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k turned, forwards with a `sense` of 1 and backwards with -1."""
    q, k = unit_rows(q), unit_rows(k)
    positions = positions.long().contiguous()
    cos, sin = _wide(cos), _wide(sin)
    q_norm, k_norm = _wide(q_norm), _wide(k_norm)

    (T, H, E), K = q.shape, k.shape[1]
    yq, yk = torch.empty(T, H, E, dtype=q.dtype), torch.empty(T, K, E, dtype=k.dtype)
    if not E:
        return yq, yk

    destination: tuple[int, ...] = NO_CACHE
    if cache is not None:
        v, k_cache, v_cache, slots = cache
        v, slots = unit_rows(v), slots.long().contiguous()
        caches = (k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), k_cache.shape[0])
        destination = (*_heads(v), *caches)

    extension().rope_forward_cpu(
        yq.data_ptr(),
        yk.data_ptr(),
        *_heads(q),
        *_heads(k),
        FLOAT_CODES[q.dtype],
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        address(q_norm),
        address(k_norm),
        eps,
        sense,
        *destination,
        T,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return yq, yk


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
    """The same bits, with k and v copied to the `slots` of the caches (slots, K, E), which are contiguous."""
    cache = (v, k_cache, v_cache, slots)
    return _turn(q, k, positions, cos, sin, q_norm, k_norm, eps, 1.0, cache)


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
    has_q_norm, has_k_norm = q_norm.numel() > 0, k_norm.numel() > 0
    if not has_q_norm and not has_k_norm:
        gq, gk = _turn(dq, dk, positions, cos, sin, q_norm, k_norm, eps, -1.0)
        return gq, gk, q_norm.new_empty(0), k_norm.new_empty(0)

    dq, dk = unit_rows(dq), unit_rows(dk)
    q = unit_rows(q) if has_q_norm else dq  # not read without a norm
    k = unit_rows(k) if has_k_norm else dk
    positions = positions.long().contiguous()
    cos, sin = _wide(cos), _wide(sin)
    wide_q, wide_k = _wide(q_norm), _wide(k_norm)

    (T, H, E), K = dq.shape, dk.shape[1]
    gq, gk = torch.empty(T, H, E, dtype=dq.dtype), torch.empty(T, K, E, dtype=dk.dtype)
    wq = torch.empty(E if has_q_norm else 0)
    wk = torch.empty(E if has_k_norm else 0)

    extension().rope_backward_cpu(
        gq.data_ptr(),
        gk.data_ptr(),
        address(wq),
        address(wk),
        *_heads(dq),
        *_heads(dk),
        *_heads(q),
        *_heads(k),
        FLOAT_CODES[dq.dtype],
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        address(wide_q),
        address(wide_k),
        eps,
        T,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return gq, gk, wq.to(q_norm.dtype), wk.to(k_norm.dtype)
