"""gae on CPU: csrc/cpu/gae.cpp, which takes addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import extension
from fastrl.kernels._check import compute_dtype
from fastrl.kernels._launch import address


def forward(
    reward: Tensor, value: Tensor, cu_seqlens: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantage and return, each (T,); an empty mask means every token."""
    dtype = compute_dtype(reward)
    reward = reward.to(dtype).contiguous()
    value = value.to(dtype).contiguous()
    ends = cu_seqlens.long().contiguous()
    mask = mask.contiguous()
    advantage = torch.empty_like(reward)
    returns = torch.empty_like(reward)

    extension().gae_cpu(
        reward.data_ptr(),
        value.data_ptr(),
        dtype == torch.float64,
        ends.data_ptr(),
        address(mask),
        gamma,
        lam,
        advantage.data_ptr(),
        returns.data_ptr(),
        reward.shape[0],
        ends.shape[0] - 1,
        torch.get_num_threads(),
    )
    return advantage, returns
