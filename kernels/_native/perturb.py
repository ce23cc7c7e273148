"""perturb on CPU: csrc/cpu/perturb.cpp, which takes addresses, sizes and row strides.

It reads fp32 and bf16; other floats are converted to fp32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._launch import FLOAT_CODES, address
from fastrl.kernels._perturb import NORM_CODES, ball, bytes_of, rows, write_back


def _ends(x: Tensor, cu_seqlens: Tensor, scope: str) -> Tensor:
    """Ends of the balls, int64; empty where every token is a ball of its own."""
    if scope == "token":
        return torch.empty(0, dtype=torch.int64)
    if cu_seqlens.numel():
        return cu_seqlens.long().contiguous()
    S, L = ball(x, cu_seqlens, scope)
    return torch.arange(S + 1) * L


def _readable(x: Tensor) -> Tensor:
    """The rows of `x`, converted to fp32 unless the kernel reads its dtype."""
    return rows(x if x.dtype in FLOAT_CODES else x.float())


def _layout(x: Tensor | None) -> tuple[int, int, int]:
    """Address, type and row stride; zeros where it is absent."""
    return (0, 0, 0) if x is None else (x.data_ptr(), FLOAT_CODES[x.dtype], x.stride(0))


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
    delta_rows = rows(delta)
    grad_rows = _readable(grad)
    embeds_rows = None if embeds is None else _readable(embeds)
    out_rows = None if out is None else _writable(out, delta_rows)
    ends = _ends(delta, cu_seqlens, scope)
    live = bytes_of(mask)

    extension().perturb_step_cpu(
        delta_rows.data_ptr(),
        delta_rows.stride(0),
        *_layout(grad_rows),
        address(live),
        address(ends),
        ends.numel() - 1,
        *delta_rows.shape,
        step_size,
        radius,
        NORM_CODES[norm],
        *_layout(embeds_rows),
        *_layout(out_rows),
        torch.get_num_threads(),
    )
    write_back(delta_rows, delta)
    if out is not None and out_rows is not None:
        write_back(out_rows, out)


def _writable(out: Tensor, like: Tensor) -> Tensor:
    """Rows that the kernel can write for `out`: its own, or fp32 ones to be copied back."""
    return rows(out) if out.dtype in FLOAT_CODES else torch.empty_like(like)


def init(
    embeds: Tensor, cu_seqlens: Tensor, mask: Tensor, radius: float, norm: str, scope: str, seed: int
) -> Tensor:
    """A start shaped like `embeds`."""
    delta = torch.empty(embeds.shape, dtype=torch.float32)
    if not delta.numel():
        return delta
    ends = _ends(embeds, cu_seqlens, scope)
    live = bytes_of(mask)

    extension().perturb_init_cpu(
        delta.data_ptr(),
        address(live),
        address(ends),
        ends.numel() - 1,
        embeds.shape[:-1].numel(),
        embeds.shape[-1],
        radius,
        NORM_CODES[norm],
        seed,
        torch.get_num_threads(),
    )
    return delta
