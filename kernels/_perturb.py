"""What the implementations of perturb share: the (T, D) rows of a tensor, and the tokens of each ball."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12  # a gradient of no greater norm has no direction
NORM_CODES = {"l2": 0, "linf": 1, "l1": 2}  # in kernels


def rows(x: Tensor) -> Tensor:
    """`x` (..., D) as (T, D) with contiguous rows: a view if possible, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def write_back(flat: Tensor, x: Tensor) -> None:
    """Copy `flat`, the rows of `x`, into `x`, unless they are a view of it."""
    if flat.data_ptr() != x.data_ptr():
        x.copy_(flat.view(x.shape))


def ball(x: Tensor, cu_seqlens: Tensor, scope: str) -> tuple[int, int]:
    """The number of balls and the tokens of each; 0 tokens for packed sequences, whose lengths differ."""
    T = x.shape[:-1].numel()
    if scope == "token":
        return T, 1
    if scope == "batch":
        return 1, T
    return (cu_seqlens.numel() - 1, 0) if cu_seqlens.numel() else (T // max(x.shape[-2], 1), x.shape[-2])


def bytes_of(mask: Tensor) -> Tensor:
    """A bool mask as (T,) bytes."""
    return mask.reshape(-1).contiguous().view(torch.uint8)
