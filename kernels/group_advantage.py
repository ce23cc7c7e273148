"""Advantages of samples relative to their group: the completions of one prompt.

    shape "linear":  A = (R - baseline) / scale
        baseline  mean           the group's mean                      (GRPO, Dr. GRPO)
                  leave_one_out  the mean of the group's others        (RLOO)
                  max            the group's best
                  none           0
        scale     std            standard deviation of the group + eps (GRPO)
                  batch_std      standard deviation of all samples + eps
                  range          the group's max - min
                  none           1                                     (Dr. GRPO, RLOO)
    shape "rank":    A = 2 rank / (K - 1) - 1, ranks 0 .. K-1 from worst to best, ties averaged
    shape "softmax": A = K softmax(R / tau) - 1

rank and softmax ignore baseline, scale, eps and unbiased.  K counts the group's scored samples.  A NaN reward
is "not scored": it enters no statistic and gets 0.  Where a group's scored rewards are all equal (one scored
sample included) every shape, baseline and scale gives exactly 0, so rounding never turns into a signal.

Moments are taken in two passes and float64: rewards of 1000 +- 1e-3 keep all their digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, one_of, same_device
from fastrl.kernels._contexts import ignore_autocast
from fastrl.kernels._native import group_advantage as native
from fastrl.kernels._rows import put_rows


@dataclass(frozen=True, slots=True)
class _Groups:
    """Samples sorted by group, their rewards and statistics; (S,) float64 but the first three.

    A statistic of a group is repeated for each of its samples: the functions of the tables are elementwise.
    """

    of: Tensor  # (S,) int64, dense group number
    offsets: Tensor  # (S+1,) int64, ends of the groups; groups after the last are empty
    scored: Tensor  # (S,) bool
    reward: Tensor  # 0 where not scored
    count: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor

    def total(self, x: Tensor) -> Tensor:
        return _segments(torch.where(self.scored, x, 0), "sum", self.offsets)[self.of]


class _Options(NamedTuple):
    baseline: str
    scale: str
    eps: float
    ddof: int
    tau: float


# --- the tables, in the order of _group_advantage.py ------------------------------------------------
BASELINES: dict[str, Callable[[_Groups], Tensor]] = {  # what is subtracted from the reward
    "mean": lambda g: g.mean,
    "leave_one_out": lambda g: g.mean - (g.reward - g.mean) / (g.count - 1),
    "max": lambda g: g.high,
    "none": lambda g: torch.zeros_like(g.reward),
}


def _std(g: _Groups, o: _Options) -> Tensor:
    return (g.total((g.reward - g.mean).square()) / (g.count - o.ddof)).sqrt() + o.eps


def _batch_std(g: _Groups, o: _Options) -> Tensor:
    n = g.scored.sum()
    centred = torch.where(g.scored, g.reward - g.reward.sum() / n, 0)
    return ((centred.square().sum() / (n - o.ddof)).sqrt() + o.eps).expand_as(g.reward)


SCALES: dict[str, Callable[[_Groups, _Options], Tensor]] = {  # what the centred reward is divided by
    "std": _std,
    "batch_std": _batch_std,
    "range": lambda g, o: g.high - g.low,
    "none": lambda g, o: torch.ones_like(g.reward),
}


def _linear(g: _Groups, o: _Options) -> Tensor:
    return (g.reward - BASELINES[o.baseline](g)) / SCALES[o.scale](g, o)


def _rank(g: _Groups, o: _Options) -> Tensor:
    by_reward = torch.where(g.scored, g.reward, torch.nan).sort(stable=True)
    # group, then reward, unscored last
    order = by_reward.indices[g.of[by_reward.indices].sort(stable=True).indices]
    of, scored, reward = g.of[order], g.scored[order], g.reward[order]
    tied = (of[1:] == of[:-1]) & (reward[1:] == reward[:-1]) & (scored[1:] == scored[:-1])
    run = _runs(~tied)
    ends = _offsets(run)
    # mean place of the run, counted from the group's start
    rank = (ends[run] + ends[run + 1] - 1).double() / 2 - g.offsets[of]
    placed = torch.empty_like(rank)
    put_rows(placed, order, rank)
    return 2 * placed / (g.count - 1) - 1


def _softmax(g: _Groups, o: _Options) -> Tensor:
    e = ((g.reward - g.high) / o.tau).exp()
    return g.count * e / g.total(e) - 1


SHAPES: dict[str, Callable[[_Groups, _Options], Tensor]] = {
    "linear": _linear,
    "rank": _rank,
    "softmax": _softmax,
}


# --- reference --------------------------------------------------------------------------------------
def reference(
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
    """The definition: (S,) advantages; `group` holds ids, or is empty for contiguous groups of `size`."""
    S = reward.shape[0]
    if S == 0:
        return reward.new_empty(0, dtype=compute_dtype(reward))
    if size:
        order = torch.arange(S, device=reward.device)
        of = order // size
    else:
        ids, order = group.sort(stable=True)
        of = _runs(ids[1:] != ids[:-1])
    g = _statistics(reward.double()[order], of)
    a = SHAPES[shape](g, _Options(baseline, scale, eps, int(unbiased), tau))
    a = torch.where(g.scored & (g.high > g.low), a, 0)
    placed = torch.empty_like(a)
    put_rows(placed, order, a)  # order has no duplicates
    return placed.to(compute_dtype(reward))


def _statistics(reward: Tensor, of: Tensor) -> _Groups:
    offsets, scored = _offsets(of), ~reward.isnan()
    count = _segments(scored.double(), "sum", offsets)[of]
    low = _segments(torch.where(scored, reward, torch.inf), "min", offsets)[of]
    high = _segments(torch.where(scored, reward, -torch.inf), "max", offsets)[of]
    reward = torch.where(scored, reward, 0)
    mean = _segments(reward, "sum", offsets)[of] / count
    return _Groups(of, offsets, scored, reward, count, mean, low, high)


def _runs(starts: Tensor) -> Tensor:
    """(S,) int64 run numbers from (S-1,) bool: does a new run start at the next element?"""
    return torch.nn.functional.pad(starts.cumsum(0), (1, 0))


def _offsets(of: Tensor) -> Tensor:
    """(S+1,) where each run of the sorted numbers `of` starts, without waiting for the device."""
    return torch.searchsorted(of, torch.arange(of.shape[0] + 1, device=of.device))


def _segments(x: Tensor, how: str, offsets: Tensor) -> Tensor:
    # unsafe skips a check that would wait for the device
    return torch.segment_reduce(x, how, offsets=offsets, unsafe=True)


register("group_advantage", "reference", forward=reference)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "group_advantage",
    "cpu",
    missing=unbuilt("group_advantage_cpu"),
    forward=native.forward,
)
register_triton("group_advantage", "group_advantage", "forward")


# --- registration -----------------------------------------------------------------------------------
# defined by its schema: a call of a `custom_op` costs 17 us more on the host
torch.library.define(
    "fastrl::group_advantage",
    "(Tensor reward, Tensor group, int size, str baseline, str scale, str shape, float eps, "
    "bool unbiased, float tau) -> Tensor",
)
forward_op = torch.ops.fastrl.group_advantage.default


@torch.library.impl("fastrl::group_advantage", "default")
def _run(
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
    if group.device.type == "cpu" and group.numel() and int(group.min()) < 0:
        raise ValueError(f"group: expected ids of 0 or more, got {int(group.min())}")
    forward = pick("group_advantage", reward, "forward")
    return forward(reward, group, size, baseline, scale, shape, eps, unbiased, tau)


@torch.library.register_fake("fastrl::group_advantage")
def _(reward, group, size, baseline, scale, shape, eps, unbiased, tau):  # type: ignore[no-untyped-def]
    return reward.new_empty(reward.shape, dtype=compute_dtype(reward))


ignore_autocast("group_advantage")


# --- public -----------------------------------------------------------------------------------------
def group_advantage(
    reward: Tensor,
    group: Tensor | int,
    *,
    baseline: str = "mean",
    scale: str = "std",
    shape: str = "linear",
    eps: float = 1e-4,
    unbiased: bool = True,
    tau: float = 0.5,
) -> Tensor:
    """Advantage of each sample within its group, without unit (in the reward's unit with scale="none").

    `unbiased` divides the variance by K - 1 instead of K; `eps` is added to std and batch_std; `tau` is the
    softmax's temperature.  A group of one always gets 0: for plain REINFORCE use the rewards themselves.  Not
    differentiable.

    Shapes:  reward (S,) bf16|fp16|fp32|fp64, NaN where not scored;  group (S,) int ids of 0 or more in any
             order, or the size of contiguous groups
             ->  (S,) fp32 (fp64 for fp64 rewards).
             A size is one launch (two with batch_std); ids are sorted first, without reading them on the
             host.
    Memory:  nothing beside the result; a few (S,) int64 vectors to sort ids with.  The reference: a dozen
             (S,) float64 vectors.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Shao et al. 2024 (GRPO); Liu et al. 2025 (Dr. GRPO); Ahmadian et al. 2024 (RLOO); Peters and
             Schaal 2007 (softmax weights).
    """
    (S,) = dims("reward", reward, "S", FLOATS)
    one_of("baseline", baseline, BASELINES)
    one_of("scale", scale, SCALES)
    one_of("shape", shape, SHAPES)
    if not tau > 0:
        raise ValueError(f"tau: expected a positive temperature, got {tau}")
    if isinstance(group, Tensor):
        dims("group", group, "S", INTS, S=S)
        same_device(reward=reward, group=group)
        ids, size = group.long(), 0
    else:
        if not isinstance(group, int):
            raise TypeError(f"group: expected ids (S={S}) or an int, got {type(group).__name__}")
        if group < 1 or S % group:
            raise ValueError(
                f"group: expected a size that divides the {S} rewards, got {group}; "
                "pass ids for unequal groups"
            )
        ids, size = torch.empty(0, dtype=torch.int64, device=reward.device), group
    return forward_op(reward.detach(), ids, size, baseline, scale, shape, float(eps), unbiased, float(tau))
