"""Packed attention that gives the bits of decode_attention: every token is a query over the pages of its own sequence.

Keys and values are copied to pages, as a cache would hold them; query t reads the first position + 1 of its sequence's.  So a
sequence scored by the trainer and the same one sampled a token at a time go through one kernel, which is batch-invariant.

The gradients are those of the attention that is the default: its forward runs once more for y and lse, which are of its own making.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import inexact, pick
from fastrl.kernels._check import compute_dtype

PAGE = 64  # tokens


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """y (T, H, E), and NaN in place of lse (T, H): the backward makes its own.  Nothing is read on the host."""
    T, device = q.shape[0], q.device
    lse = torch.full(q.shape[:2], torch.nan, dtype=compute_dtype(q), device=device)
    if T == 0:
        return q.new_empty(q.shape), lse
    ends = cu_seqlens.long()
    token = torch.arange(T, device=device)
    rows = torch.searchsorted(ends[1:], token, right=True)
    position = token - ends[rows]
    used = (ends.diff() + PAGE - 1) // PAGE  # pages of each sequence
    first = used.cumsum(0) - used
    pages = T // PAGE + used.numel()  # enough: each sequence leaves less than one page unused
    slots = first[rows] * PAGE + position
    cache = [x.new_empty(pages * PAGE, *x.shape[1:]).index_copy_(0, slots, x).view(pages, PAGE, *x.shape[1:]) for x in (k, v)]
    column = torch.arange(-(-(max_seqlen or T) // PAGE), device=device)
    table = (first[:, None] + column).clamp_(max=pages - 1).to(torch.int32)
    y = pick("decode_attention", q, "forward")(q, *cache, table, (position + 1).to(torch.int32), rows, scale)
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    y, lse = inexact("attention", q, "forward")(q, k, v, cu_seqlens, scale, max_seqlen)
    return inexact("attention", q, "backward")(dy, q, k, v, y, lse, cu_seqlens, scale, max_seqlen)
