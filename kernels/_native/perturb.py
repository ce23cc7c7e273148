"""perturb on CPU: csrc/cpu/perturb.cpp takes addresses, sizes and row strides.  Other floats than fp32 and
bf16 go by way of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._perturb import NORM_CODES, ball, bytes_of, rows, write_back


def _ends(x: Tensor, cu_seqlens: Tensor, scope: str) -> Tensor:
    """Ends of the balls, int64; empty where each token is one."""
    if scope == "token":
        return torch.empty(0, dtype=torch.int64)
    if cu_seqlens.numel():
        return cu_seqlens.long().contiguous()
    S, L = ball(x, cu_seqlens, scope)
    return torch.arange(S + 1) * L


def _typed(x: Tensor) -> Tensor:
    return rows(x if x.dtype in FLOAT_CODES else x.float())


def step(
    delta: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    step_size: float,
    radius: float,
    norm: str,
    scope: str,
    embeds: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Move `delta` in place; write embeds + delta to `out` where they are given."""
    if not delta.numel():
        return
    x, g, ends = rows(delta), _typed(grad), _ends(delta, cu_seqlens, scope)
    live = bytes_of(mask)
    e = None if embeds is None else _typed(embeds)
    to = None if out is None else rows(out) if out.dtype in FLOAT_CODES else torch.empty_like(x)
    extension().perturb_step_cpu(
        x.data_ptr(),
        x.stride(0),
        g.data_ptr(),
        FLOAT_CODES[g.dtype],
        g.stride(0),
        _address(live),
        _address(ends),
        ends.numel() - 1,
        *x.shape,
        step_size,
        radius,
        NORM_CODES[norm],
        *_described(e),
        *_described(to),
        torch.get_num_threads(),
    )
    write_back(x, delta)
    if to is not None and out is not None:
        write_back(to, out)


def init(
    embeds: Tensor, cu_seqlens: Tensor, mask: Tensor, radius: float, norm: str, scope: str, seed: int
) -> Tensor:
    """A start shaped like `embeds`."""
    delta = torch.empty(embeds.shape, dtype=torch.float32)
    if delta.numel():
        ends, live, T = _ends(embeds, cu_seqlens, scope), bytes_of(mask), embeds.shape[:-1].numel()
        extension().perturb_init_cpu(
            delta.data_ptr(),
            _address(live),
            _address(ends),
            ends.numel() - 1,
            T,
            embeds.shape[-1],
            radius,
            NORM_CODES[norm],
            seed,
            torch.get_num_threads(),
        )
    return delta


def _described(x: Tensor | None) -> tuple[int, int, int]:
    """Address, type and row stride; zeros for what is absent."""
    return (0, 0, 0) if x is None else (x.data_ptr(), FLOAT_CODES[x.dtype], x.stride(0))


def _address(x: Tensor) -> int:
    return x.data_ptr() if x.numel() else 0
