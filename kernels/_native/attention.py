"""attention on CPU: csrc/cpu/attention.cpp, which takes addresses, ends and strides.

It checks the ends before it reads through any of them.  fp16 is widened here: its kernels are those of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, unit_rows

DTYPES = (*FLOAT_CODES, torch.float16)
WIDEST = 256  # of a head


def obstacle(q: Tensor) -> str:
    """Why the kernels cannot take such queries, or nothing."""
    E = q.shape[-1]
    return "" if E <= WIDEST else f"it takes heads of a width up to {WIDEST}, got E={E}"


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y (T, H, E) and lse (T, H)."""
    lse = torch.empty(q.shape[:2])
    return _attend(q, k, v, cu_seqlens, cu_seqlens, scale, lse), lse


def prefix(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    """y (T, H, E) of the last tokens of each sequence."""
    return _attend(q, k, v, cu_seqlens, cu_seqlens_k, scale, None)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, scale: float, lse: Tensor | None
) -> Tensor:
    """y (T, H, E), and lse written to where it is asked for."""
    dtype = q.dtype
    q, k, v = (unit_rows(_taken(x)) for x in (q, k, v))
    ends, ends_k = (x.long().contiguous() for x in (ends, ends_k))
    (T, H, E), (T_k, K, _) = q.shape, k.shape
    y = torch.empty(T, H, E, dtype=q.dtype)

    extension().attention_forward_cpu(
        y.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        q.data_ptr(),
        *q.stride()[:2],
        k.data_ptr(),
        *k.stride()[:2],
        v.data_ptr(),
        *v.stride()[:2],
        FLOAT_CODES[q.dtype],
        ends.data_ptr(),
        ends_k.data_ptr(),
        scale,
        ends.numel() - 1,
        T,
        T_k,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return y.to(dtype)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int,
) -> tuple[Tensor, ...]:
    """dq (T, H, E), dk and dv (T, K, E)."""
    dtype = q.dtype
    dy, q, k, v = (unit_rows(_taken(x)) for x in (dy, q, k, v))
    y, lse, ends = _taken(y).contiguous(), lse.contiguous(), cu_seqlens.long().contiguous()
    (T, H, E), K = q.shape, k.shape[1]
    grads = [torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v)]

    extension().attention_backward_cpu(
        *(x.data_ptr() for x in grads),
        dy.data_ptr(),
        *dy.stride()[:2],
        q.data_ptr(),
        *q.stride()[:2],
        k.data_ptr(),
        *k.stride()[:2],
        v.data_ptr(),
        *v.stride()[:2],
        y.data_ptr(),
        lse.data_ptr(),
        FLOAT_CODES[q.dtype],
        ends.data_ptr(),
        scale,
        ends.numel() - 1,
        T,
        H,
        K,
        E,
        torch.get_num_threads(),
    )
    return tuple(x.to(dtype) for x in grads)


def _taken(x: Tensor) -> Tensor:
    """`x` in a type that the kernels take."""
    return x if x.dtype in FLOAT_CODES else x.float()
