"""Vectors of tokens and samples: gae, group_advantage, policy_loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastrl.kernels import gae as estimates
from fastrl.kernels import group_advantage as groups
from fastrl.kernels import policy_loss as losses
from fastrl.kernels._policy_arguments import policy_arguments
from fastrl.kernels.policy_loss import SURROGATES
from ptx.cases.case import BF16, F32, Build, Case, case, kernel


def gae(
    lengths: list[int], gamma: float, lam: float, *, masked: bool = True, dtype: torch.dtype = F32
) -> Case:
    T = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    reward, value = torch.randn(T).to(dtype), torch.randn(T).to(dtype)
    mask = torch.rand(T) > 0.3 if masked else torch.empty(0, dtype=torch.bool)
    want = estimates.reference(reward.double(), value.double(), cu, mask, gamma, lam)
    run = partial(kernel, "gae", "forward", reward)
    return case(lambda: run()(reward, value, cu, mask, gamma, lam), want, (1e-5, 1e-5))


def group_advantage(
    size: int, S: int, baseline: str, scale: str, shape: str, *, dtype: torch.dtype = F32, ids: bool = False
) -> Case:
    """Rewards around 1000, some equal, some missing."""
    reward = 1000 + torch.randn(S)
    reward[torch.rand(S) < 0.25] = 1000.5
    reward[torch.rand(S) < 0.1] = torch.nan
    reward = reward.to(dtype)
    group = torch.randint(5, (S,)) * 7 if ids else torch.empty(0, dtype=torch.int64)
    options = (0 if ids else size, baseline, scale, shape, 1e-4, True, 0.5)
    want = groups.reference(reward.double(), group, *options)
    run = partial(kernel, "group_advantage", "forward", reward)
    return case(lambda: [run()(reward, group, *options)], (want,), (1e-6,))


def policy_loss(
    surrogate: str,
    T: int,
    *,
    ratio: str = "token",
    kl: str | None = None,
    mask: bool = True,
    correction: bool = True,
    entropy: bool = True,
) -> Case:
    logp = -torch.randn(T).abs()
    given: dict[str, Any] = {
        "old_logp": logp + 0.3 * torch.randn(T),
        "advantage": torch.randn(T),
        "token_weight": torch.rand(T),
        "surrogate": surrogate,
        "ratio": ratio,
        "mask": torch.rand(T) > 0.2 if mask else None,
        "correction": torch.rand(T) + 0.5 if correction else None,
    }
    if entropy:
        given |= {"entropy": torch.randn(T).abs(), "entropy_coef": 0.1}
    if kl:
        given |= {"kl": kl, "kl_coef": 0.1, "ref_logp": logp + 0.2 * torch.randn(T)}
    if ratio == "sequence":
        given["cu_seqlens"] = torch.tensor([0, min(3, T), min(3, T), (T + 1) // 2, T])
    exact = {k: v.double() if _is_float(v) else v for k, v in given.items()}
    _, columns, options = policy_arguments(logp, **given)
    _, wide, _ = policy_arguments(logp.double(), **exact)
    want = losses._fused(wide, options)
    run = partial(kernel, "policy_loss", "forward", logp)
    return case(lambda: run()(columns, options), want, (2e-6 * T, 2e-4, 2e-6, 1e-7))


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _every_surrogate(names: list[str], first: int) -> dict[str, Build]:
    """A case for each, with the other arguments present and absent in turn."""
    rows: dict[str, Build] = {}
    for i, name in enumerate(names, first):
        ratio, kl = ("token", "sequence")[i % 2], (None, "k3", "k1_is", "k3+_cut")[i % 4]
        rows[f"policy_loss {name}"] = partial(
            policy_loss,
            name,
            (300, 513, 5, 700)[i % 4],
            ratio=ratio,
            kl=kl,
            mask=i % 3 != 0,
            correction=i % 2 == 0,
            entropy=i % 3 != 1,
        )
    return rows


IN_KERNEL = [name for name, row in SURROGATES.items() if row.triton is not None]
GROUPS: dict[str, Build] = {
    "group_advantage mean": partial(group_advantage, 16, 64, "mean", "std", "linear"),
    "group_advantage batch": partial(group_advantage, 7, 35, "leave_one_out", "batch_std", "linear"),
    "group_advantage rank": partial(group_advantage, 16, 64, "mean", "std", "rank"),
    "group_advantage softmax": partial(group_advantage, 7, 35, "mean", "std", "softmax"),
    "group_advantage ids": partial(group_advantage, 0, 40, "max", "range", "linear", ids=True),
    "group_advantage ids rank": partial(group_advantage, 0, 40, "mean", "std", "rank", ids=True),
}
CASES: dict[str, Build] = {
    "gae masked": partial(gae, [1, 0, 129, 5], 0.99, 0.95),
    "gae all": partial(gae, [300, 40], 1.0, 1.0, masked=False),
    "gae bf16": partial(gae, [700, 600], 1.0, 0.95, dtype=BF16),
    **GROUPS,
    **_every_surrogate(IN_KERNEL, 0),
}
LONG: dict[str, Build] = {
    "gae long": partial(gae, [2100], 0.9, 0.0),
    "gae of one": partial(gae, [1], 1.0, 1.0),
    "group_advantage of one": partial(group_advantage, 1, 4, "mean", "std", "linear"),
    "group_advantage large": partial(group_advantage, 1100, 1100, "mean", "std", "linear"),
    "group_advantage bf16": partial(group_advantage, 3, 9, "mean", "std", "rank", dtype=BF16),
    **{f"{name}, otherwise": build for name, build in _every_surrogate(IN_KERNEL, 3).items()},
}
