"""Advantage estimators: rewards of groups of samples in, one number per sample out.  A variant is a row.

Most rows are arguments of `ops.group_advantage`; objective.py has the algorithms that use them.  A NaN
reward means "not scored": it enters no statistic, and its advantage is 0.  Rows with statistics of the whole
batch get the samples of every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.errors import UserError


@dataclass(frozen=True, slots=True)
class Advantage:
    """One estimator: `compute(reward (S,), group, length (S,), **params) -> (S,)`, for contiguous groups of
    `group` samples.

    least        least number of completions per prompt
    whole_batch  whether a sample's advantage depends on other groups; it then needs the rewards of all
                 processes
    signed       whether rewards may be below 0
    """

    compute: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    least: int = 2
    whole_batch: bool = False
    signed: bool = True

    def __call__(self, reward: Tensor, group: int, length: Tensor | None = None) -> Tensor:
        """Advantages (S,); `length` is each sample's number of loss tokens, all equal if None."""
        if length is None:
            length = torch.ones_like(reward)
        return self.compute(reward, group, length, **self.params)

    def with_params(self, **changes: Any) -> Advantage:
        """The same estimator with some parameters changed; an unknown name is a ValueError."""
        for name in changes:
            if name not in self.params:
                known = ", ".join(self.params) or "none"
                raise ValueError(f"{name}: not a parameter of this advantage, which has: {known}")
        whole = self.whole_batch or changes.get("scale") == "batch_std"
        return replace(self, params={**self.params, **changes}, whole_batch=whole)


def _relative(reward: Tensor, group: int, length: Tensor, **columns: Any) -> Tensor:
    return ops.group_advantage(reward, group, **columns)


def _whitened(reward: Tensor, group: int, length: Tensor, *, centred: bool, ddof: int) -> Tensor:
    """(R - mean) / sqrt(variance + 1e-8) over all tokens of the batch, each with its sample's reward (the
    return-to-go at gamma 1).

    The variance divides by N - ddof.
    """
    x = _relative(reward, group, length, scale="none") if centred else reward
    known, x = ~reward.isnan(), x.nan_to_num(0).double()
    some = x[known]
    if some.numel() == 0 or bool((some == some[0]).all()):
        return torch.zeros_like(reward)

    weight = torch.where(known, length.double(), 0)
    n = weight.sum()
    mean = (weight * x).sum() / n
    squares = (weight * (x - mean).square()).sum()
    deviation = (squares / (n - ddof) + 1e-8).sqrt()
    return torch.where(known, (x - mean) / deviation, 0).to(reward.dtype)


def _gpg(reward: Tensor, group: int, length: Tensor, *, zero: str) -> Tensor:
    """alpha (R - mean): alpha compensates for the samples without a gradient, those of which `zero` is 0."""
    centred = _relative(reward, group, length, scale="none")
    if zero == "reward":
        counted = reward.nan_to_num(0)
    else:
        counted = centred.view(-1, group).abs().amax(1).repeat_interleave(group)
    return centred * reward.numel() / counted.count_nonzero().clamp(min=1)


def _others(reward: Tensor, group: int, length: Tensor, *, eps: float) -> Tensor:
    """(R - mean) / (std + eps), both of the group's other samples; where the others are all equal, only their
    mean is subtracted.
    """
    table = reward.view(-1, group).double()
    known, x = ~table.isnan(), table.nan_to_num(0)
    count = known.sum(1, keepdim=True).clamp(min=1)
    n = (count - 1).clamp(min=1)

    # centred first: the sums below lose fewer digits
    centre = x.sum(1, keepdim=True) / count
    centred = torch.where(known, x - centre, 0)
    mean = (centred.sum(1, keepdim=True) - centred) / n
    squares = centred.square()
    of_others = squares.sum(1, keepdim=True) - squares
    variance = (of_others - n * mean.square()) / (n - 1)
    deviation = variance.clamp(min=0).sqrt()

    largest = centred.abs().amax(1, keepdim=True)
    flat = ~(deviation > 1e-7 * largest)
    advantage = (centred - mean) / torch.where(flat, 1, deviation + eps)
    differ = centred.amax(1, keepdim=True) > centred.amin(1, keepdim=True)
    return torch.where(known & differ, advantage, 0).flatten().to(reward.dtype)


def _max_rl(reward: Tensor, group: int, length: Tensor) -> Tensor:
    """(R - mean) / mean of rewards of 0 or more."""
    if bool((reward < 0).any()):
        lowest = float(reward.nan_to_num(0).min())
        raise UserError(f"--advantage max_rl: expected rewards of 0 or more, got {lowest:g}")
    mean = reward.view(-1, group).nanmean(1).repeat_interleave(group)
    centred = _relative(reward, group, length, scale="none")
    return torch.where(centred != 0, centred / mean, 0)


def _max_at_k(reward: Tensor, group: int, length: Tensor, *, k: int) -> Tensor:
    """What a sample adds to the best of k, over all draws of the other k - 1 from its group.

    k/n E[max(R - max of k-1 others, 0)]; times the score function, an unbiased gradient of E[best of k].
    """
    table = reward.view(-1, group).double()
    n = (~table.isnan()).sum(1, keepdim=True)
    n = n.double().clamp(min=1)
    k_of = torch.minimum(n, torch.full_like(n, k or group))
    low = table.nan_to_num(torch.inf).sort(dim=1).values  # samples without a reward come last, and add 0

    # (P, G): probability that the sample at each place is the best of the k - 1 others
    place = torch.arange(group, dtype=torch.float64, device=reward.device)
    draws = _log_choose(n - 1, k_of - 1)
    log_share = _log_choose(place.expand_as(low), k_of - 2) - draws
    best = torch.where(place >= k_of - 2, log_share.exp(), 0)

    # (P, G, G): gain over it; the sample's own place gives 0
    high = table.nan_to_num(-torch.inf)
    gain = (high[:, :, None] - low[:, None, :]).clamp(min=0)
    expected = (gain * best[:, None, :]).sum(2)
    return (expected * k_of / n).flatten().to(reward.dtype)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n choose k, where 0 <= k <= n."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


def _columns(baseline: str = "mean", scale: str = "std", **others: Any) -> Advantage:
    params = {"baseline": baseline, "scale": scale, "eps": 1e-4, **others}
    return Advantage(_relative, params, whole_batch=scale == "batch_std")


ADVANTAGES: dict[str, Advantage] = {
    "zscore": _columns(),
    "center": _columns(scale="none"),
    "rloo": _columns("leave_one_out", "none"),
    "batch_std": _columns(scale="batch_std"),
    "best": _columns("max", "none"),
    "best_range": _columns("max", "range"),
    "rank": Advantage(_relative, {"shape": "rank"}),
    "softmax": Advantage(_relative, {"shape": "softmax", "tau": 0.5}),
    "leave_one_out_zscore": Advantage(_others, {"eps": 1e-6}),
    "whiten": Advantage(_whitened, {"centred": False, "ddof": 1}, least=1, whole_batch=True),
    "center_whiten": Advantage(_whitened, {"centred": True, "ddof": 1}, whole_batch=True),
    "gpg": Advantage(_gpg, {"zero": "advantage"}, whole_batch=True),
    "max_rl": Advantage(_max_rl, signed=False),
    "max_at_k": Advantage(_max_at_k, {"k": 0}),  # 0: the whole group
}


def of_completions(advantage: Advantage) -> Advantage:
    """The estimator for groups whose last sample is a demonstration, with statistics of the completions
    alone.

    The demonstration uses the same statistics; where the completions are all equal, only their mean is
    subtracted.
    Raises:  UserError for an estimator that is not a distance from the group's mean.
    """
    p = advantage.params
    if p.get("baseline") != "mean" or p.get("scale") not in ("std", "none"):
        raise UserError(
            "--group-statistics: own goes with the advantages zscore and center only; leave it out, "
            "or take one of them"
        )
    return Advantage(_of_completions, {"scale": p["scale"], "eps": p["eps"]})


def _of_completions(reward: Tensor, group: int, length: Tensor, *, scale: str, eps: float) -> Tensor:
    table = reward.view(-1, group)
    completions, demonstration = table[:, :-1], table[:, -1:]
    flat = completions.reshape(-1)
    a = _relative(flat, group - 1, length, scale=scale, eps=eps)
    a = a.view(-1, group - 1)

    own = completions.double()
    known = ~own.isnan()
    mean = own.nanmean(1, keepdim=True)
    centred = torch.where(known, own - mean, 0)
    squares = centred.square().sum(1, keepdim=True)
    degrees = known.sum(1, keepdim=True) - 1
    deviation = (squares / degrees.clamp(min=1)).sqrt()

    divisor = deviation + eps if scale == "std" else torch.ones_like(deviation)
    divisor = torch.where(a.any(1, keepdim=True), divisor, 1)
    shown = (demonstration - mean) / divisor
    shown = shown.nan_to_num(0).to(a.dtype)
    return torch.cat([a, shown], 1).flatten()


# --- several rewards ---------------------------------------------------------------------------------
def _sum_then_normalize(
    parts: Tensor, weight: Tensor, advantage: Advantage, group: int, length: Tensor
) -> Tensor:
    total = (weight[:, None] * parts).nansum(0)
    return advantage(torch.where(parts.isnan().all(0), torch.nan, total), group, length)


def _normalize_then_sum(
    parts: Tensor, weight: Tensor, advantage: Advantage, group: int, length: Tensor
) -> Tensor:
    """Each reward becomes an advantage; their weighted sum is whitened over the samples of the batch
    (GDPO).
    """
    known = ~parts.isnan().all(0)
    n = known.sum()
    x = sum(w * advantage(part, group, length) for w, part in zip(weight, parts, strict=True))

    mean = torch.where(known, x, 0).sum() / n.clamp(min=1)
    centred = torch.where(known, x - mean, 0)
    squares = centred.square().sum()
    deviation = (squares / (n - 1).clamp(min=1)).sqrt()

    # a group that is all equal in every reward stays at 0
    moved = x.view(-1, group).ne(0).any(1)
    moved = moved.repeat_interleave(group)
    whitened = (x - mean) / (deviation + 1e-4)
    return torch.where(known & moved, whitened, 0)


# (rewards (F, S), their weights (F,), advantage, group, length (S,)) -> (S,); TRL's names
COMBINE: dict[str, Callable[[Tensor, Tensor, Advantage, int, Tensor], Tensor]] = {
    "sum_then_normalize": _sum_then_normalize,
    "normalize_then_sum": _normalize_then_sum,
}
