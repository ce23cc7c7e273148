"""Packed attention with the bits of decode_attention: every token is a query over the pages of its sequence.

Keys and values are copied to pages, as a cache would hold them; a query at position t reads the first t + 1
of its sequence.  A sequence scored by the trainer and the same one sampled token by token therefore go
through one kernel, which is batch-invariant.

The gradients are those of the default attention: its forward runs again, because its backward needs its own y
and lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import inexact, pick
from fastrl.kernels._check import compute_dtype
from fastrl.kernels._rows import put_rows

PAGE = 64  # tokens


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y (T, H, E), and NaN in place of lse (T, H), which the backward computes itself.

    Nothing is read on the host.
    """
    lse = torch.full(q.shape[:2], torch.nan, dtype=compute_dtype(q), device=q.device)
    return prefix(q, k, v, cu_seqlens, cu_seqlens, scale, max_seqlen), lse


def prefix(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    """y (T, H, E) of the last tokens of each sequence; max_seqlen counts keys, and 0 means unknown."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape)
    ends, ends_k = cu_seqlens.long(), cu_seqlens_k.long()
    rows, place = _within(ends, q.shape[0])
    rows_k, position = _within(ends_k, k.shape[0])
    used = (ends_k.diff() + PAGE - 1) // PAGE  # pages of each sequence
    first = used.cumsum(0) - used
    pages = k.shape[0] // PAGE + used.numel()  # enough: each sequence leaves less than one page unused
    slots = first[rows_k] * PAGE + position
    cache = [_paged(x, slots, pages) for x in (k, v)]
    column = torch.arange(-(-(max_seqlen or k.shape[0]) // PAGE), device=q.device)
    table = (first[:, None] + column).clamp_(max=pages - 1).to(torch.int32)
    lengths = (place + (ends_k.diff() - ends.diff())[rows] + 1).to(torch.int32)
    return pick("decode_attention", q, "forward")(q, *cache, table, lengths, rows, scale)


def _paged(x: Tensor, slots: Tensor, pages: int) -> Tensor:
    """Tokens (T, K, E) copied to their slots of pages (pages, PAGE, K, E); other slots hold anything."""
    flat = x.new_empty(pages * PAGE, *x.shape[1:])
    put_rows(flat, slots, x)
    return flat.view(pages, PAGE, *x.shape[1:])


def _within(ends: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed token, and its place in it."""
    token = torch.arange(T, device=ends.device)
    rows = torch.searchsorted(ends[1:], token, right=True)
    return rows, token - ends[rows]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    y, lse = inexact("attention", q, "forward")(q, k, v, cu_seqlens, scale, max_seqlen)
    return inexact("attention", q, "backward")(dy, q, k, v, y, lse, cu_seqlens, scale, max_seqlen)
