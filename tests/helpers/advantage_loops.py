"""group_advantage and gae as they are written down, a group or a token at a time: what the tests of every
implementation share.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def gae_loop(reward: Tensor, value: Tensor, cu: list[int], mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The recurrence of generalised advantage estimation, one token at a time."""
    advantage = torch.zeros_like(reward)
    for start, end in pairwise(cu):
        next_value, next_advantage = torch.zeros(2, dtype=reward.dtype)
        for t in range(end - 1, start - 1, -1):
            if mask[t]:
                delta = reward[t] + gamma * next_value - value[t]
                next_value, next_advantage = value[t], delta + gamma * lam * next_advantage
                advantage[t] = next_advantage
    return advantage


def one_group(r: Tensor, batch: Tensor, baseline: str, scale: str, shape: str) -> Tensor:
    """Advantages of the scored rewards `r` of one group, with PyTorch's own statistics and the op's default
    eps and tau.
    """
    if r.numel() < 2 or r.max() == r.min():
        return torch.zeros_like(r)
    K = r.numel()
    if shape == "rank":
        place = torch.stack([(r < x).sum() + ((r == x).sum() - 1) / 2 for x in r])
        return 2 * place.to(r.dtype) / (K - 1) - 1
    if shape == "softmax":
        return K * torch.softmax(r / 0.5, 0) - 1
    others = (r.sum() - r) / (K - 1)
    base = {"mean": r.mean(), "leave_one_out": others, "max": r.max(), "none": 0}[baseline]
    return (r - base) / {
        "std": r.std() + 1e-4,
        "batch_std": batch.std() + 1e-4,
        "range": r.max() - r.min(),
        "none": 1,
    }[scale]


def groups_loop(reward: Tensor, ids: Tensor, baseline: str, scale: str, shape: str) -> Tensor:
    """The same for groups given by ids, in float64; 0 where a reward is NaN."""
    reward, expected = reward.double(), torch.zeros_like(reward, dtype=torch.float64)
    for i in ids.unique():
        at = (ids == i) & ~reward.isnan()
        expected[at] = one_group(reward[at], reward[~reward.isnan()], baseline, scale, shape)
    return expected


def ragged(S: int = 60) -> tuple[Tensor, Tensor]:
    """Rewards (float64, some NaN, many ties) and ids in no order: of a group of one, with one scored, without
    spread, without any.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (S,), generator=g) * 7
    reward = torch.randint(0, 4, (S,), generator=g).double() / 2 + 0.01 * torch.randint(
        0, 2, (S,), generator=g
    )
    reward[torch.randperm(S, generator=g)[: S // 7]] = torch.nan
    ids[0], reward[0] = 1000, 5.0
    ids[1:3], reward[1:3] = 500, torch.tensor([torch.nan, 2.0], dtype=torch.float64)
    ids[3:6], reward[3:6] = 2000, 0.1
    ids[6:8], reward[6:8] = 3000, torch.nan
    return reward, ids
