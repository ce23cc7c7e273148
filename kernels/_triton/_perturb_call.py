"""What the Triton kernels of perturb_step share: the rows of a call, and how an element and a ball shrink."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._perturb import TINY

LEAST_NORM = tl.constexpr(TINY)  # a gradient of no greater norm has no direction


class Call(NamedTuple):
    """The rows of one call, and its numbers."""

    delta: Tensor
    grad: Tensor
    mask: Tensor  # any tensor unless `masked`
    embeds: Tensor  # any tensor unless `add`
    out: Tensor
    step: float
    radius: float
    masked: bool
    add: bool  # write embeds + delta to `out`

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Elements from one row to the next, of delta, grad, embeds and out."""
        return self.delta.stride(0), self.grad.stride(0), self.embeds.stride(0), self.out.stride(0)


@triton.jit
def over(size, threshold):  # type: ignore[no-untyped-def]
    """max(size - threshold, 0) for an fp64 threshold."""
    high = threshold.to(tl.float32)
    low = (threshold - high.to(tl.float64)).to(tl.float32)
    return tl.maximum((size - high) - low, 0.0)


@triton.jit
def shrinkage(yy, radius):  # type: ignore[no-untyped-def]
    """radius / sqrt(yy) where that is less than 1."""
    return tl.where(yy > radius * radius, radius / tl.sqrt(tl.maximum(yy, 1e-300)), 1.0)
