"""group_advantage on CPU: csrc/cpu/group_advantage.cpp, which takes addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._check import compute_dtype
from fastrl.kernels._group_advantage import BASELINES, SCALES, SHAPES


def forward(
    reward: Tensor,
    group: Tensor,
    size: int,
    baseline: str,
    scale: str,
    shape: str,
    eps: float,
    unbiased: bool,
    tau: float,
) -> Tensor:
    """(S,) advantages; `group` holds ids, or is empty for contiguous groups of `size`."""
    reward = reward.to(compute_dtype(reward)).contiguous()
    group = group.contiguous()
    out = torch.empty_like(reward)

    extension().group_advantage_cpu(
        reward.data_ptr(),
        reward.dtype == torch.float64,
        0 if size else group.data_ptr(),
        size,
        BASELINES.index(baseline),
        SCALES.index(scale),
        SHAPES.index(shape),
        eps,
        unbiased,
        tau,
        out.data_ptr(),
        reward.shape[0],
        torch.get_num_threads(),
    )
    return out
