"""The numerical budget: no further from float64 than PyTorch's own result in the same dtype, times a factor,
plus one unit in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FACTOR = 1.5
LEAST = 2.0**-20  # scale of a result that is 0 everywhere


def largest_error(x: Tensor, truth: Tensor) -> float:
    """The largest distance of any element from float64 `truth`; 0 for empty tensors."""
    return (x.double() - truth).abs().max().item() if truth.numel() else 0.0


def allowed_error(
    theirs: Tensor, truth: Tensor, dtype: torch.dtype, *, factor: float = FACTOR, ulps: float = 1.0
) -> float:
    """What a result of `dtype` may be off, `theirs` being PyTorch's own result of the same inputs."""
    if not truth.numel():
        return 0.0
    scale = max(truth.abs().max().item(), LEAST)
    return factor * largest_error(theirs, truth) + ulps * ULP[dtype] * scale
