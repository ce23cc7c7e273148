"""rope on the CPU: csrc/cpu/rope.cpp, which takes addresses and strides, fp32 tables and norm weights.

It looks at every position and slot before it reads or writes through one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows

_C = extension()


def _wide(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _address(x: Tensor) -> int:
    return x.data_ptr() if x.numel() else 0


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
    (T, H, E), K, q, k = q.shape, k.shape[1], unit_rows(q), unit_rows(k)
    yq, yk = torch.empty(T, H, E, dtype=q.dtype), torch.empty(T, K, E, dtype=k.dtype)
    positions, cos, sin, q_norm, k_norm = (
        positions.long().contiguous(),
        _wide(cos),
        _wide(sin),
        _wide(q_norm),
        _wide(k_norm),
    )
    where: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)
    if cache is not None:
        v, k_cache, v_cache, slots = unit_rows(cache[0]), cache[1], cache[2], cache[3].long().contiguous()
        where = (
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            k_cache.shape[0],
        )
    if E:
        _C.rope_forward_cpu(
            yq.data_ptr(),
            yk.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            FLOAT_CODES[q.dtype],
            positions.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0],
            _address(q_norm),
            _address(k_norm),
            eps,
            sense,
            *where,
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
    return _turn(q, k, positions, cos, sin, q_norm, k_norm, eps, 1.0, (v, k_cache, v_cache, slots))


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
    if not any(norms):
        gq, gk = _turn(dq, dk, positions, cos, sin, q_norm, k_norm, eps, -1.0)
        return gq, gk, q_norm.new_empty(0), k_norm.new_empty(0)
    (T, H, E), K, dq, dk = dq.shape, dk.shape[1], unit_rows(dq), unit_rows(dk)
    q, k = (unit_rows(x) if used else d for x, d, used in zip((q, k), (dq, dk), norms, strict=True))
    gq, gk = torch.empty(T, H, E, dtype=dq.dtype), torch.empty(T, K, E, dtype=dk.dtype)
    wq, wk = (torch.empty(E if used else 0) for used in norms)
    positions, cos, sin, wide_q, wide_k = (
        positions.long().contiguous(),
        _wide(cos),
        _wide(sin),
        _wide(q_norm),
        _wide(k_norm),
    )
    strides = [(x.data_ptr(), x.stride(0), x.stride(1)) for x in (dq, dk, q, k)]
    _C.rope_backward_cpu(
        gq.data_ptr(),
        gk.data_ptr(),
        _address(wq),
        _address(wk),
        *(n for x in strides for n in x),
        FLOAT_CODES[dq.dtype],
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        _address(wide_q),
        _address(wide_k),
        eps,
        T,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return gq, gk, wq.to(q_norm.dtype), wk.to(k_norm.dtype)
