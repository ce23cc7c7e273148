"""What was sampled for a training step: groups of completions with their rewards, and the metrics of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.batch.types import Rollouts
from fastrl.methods.grpo.prompts import PromptItem
from fastrl.parallel.world import World
from fastrl.report.metric import ratios
from fastrl.report.metrics import ROLLOUT_METRICS
from fastrl.rewards.functions import Scored
from fastrl.train.source import LoggedSample, Metrics


@dataclass(frozen=True, slots=True)
class SampledGroups:
    """Completions of this process's share of some prompts, group by group.

    items     prompt and columns of each completion
    places    each group's place among all groups of the step
    total     groups of all processes: the range of `places`
    numbers   each group's prompt, among all prompts there are
    members   sequences that join the groups without having been sampled, or None (see methods/hybrid)
    """

    items: list[PromptItem]
    rollouts: Rollouts
    scored: Scored
    places: list[int]
    total: int
    numbers: list[int]
    members: Members | None = None

    @property
    def reward(self) -> Tensor:
        """(S,) fp32, NaN where no reward applies."""
        return torch.tensor(self.scored.reward, dtype=torch.float32, device=self.rollouts.tokens.device)

    @property
    def size(self) -> int:
        """Sequences of each group."""
        return len(self.rollouts) // max(len(self.places), 1)

    @staticmethod
    def join(rounds: Sequence[SampledGroups]) -> SampledGroups:
        """The groups of several rounds as those of one."""
        items = [item for r in rounds for item in r.items]
        places = [place for r in rounds for place in r.places]
        numbers = [number for r in rounds for number in r.numbers]
        return SampledGroups(
            items=items,
            rollouts=Rollouts.join([r.rollouts for r in rounds]),
            scored=Scored.join([r.scored for r in rounds]),
            places=places,
            total=sum(r.total for r in rounds),
            numbers=numbers,
        )

    def samples(self, group: int) -> list[LoggedSample]:
        """The first group's completions, at most four, as samples.jsonl has them."""
        scored, rollouts = self.scored, self.rollouts
        texts = rollouts.text or list(map(str, rollouts.completions()))
        columns: dict[str, Sequence[object]] = {
            "completion": texts,
            "messages": rollouts.messages or (),
            "reward": scored.reward,
            "message": scored.message,
            **scored.extra,
        }
        known = {name: values for name, values in columns.items() if values}
        few = range(min(4, group, len(self.items)))
        return [
            {"prompt": self.items[i][0]} | {name: values[i] for name, values in known.items()} for i in few
        ]


@dataclass(frozen=True, slots=True)
class Members:
    """What groups that also hold sequences that were not sampled (demonstrations, chosen or rejected
    completions) know of each sequence.

    kind      (S,) int64, a number of fastrl.algorithms.hybrid.KINDS for each sequence of the groups
    coef      (S,) fp32, relative weight of the sequence in the loss; 0 leaves it out
    rewarded  the groups without the supervised sequences, which have no reward
    """

    kind: Tensor
    coef: Tensor
    rewarded: SampledGroups


def rollout_metrics(groups: SampledGroups, group: int, version: int, world: World) -> Metrics:
    """Means over all processes and all that was sampled, under TRL's names.

    Rewards that do not apply (NaN) are left out.  `group` is completions per prompt, `version` the optimizer
    steps that the weights have seen.
    """
    rollouts, scored = groups.rollouts, groups.scored
    length = rollouts.lengths.double()
    stale = (version - rollouts.weight_version[rollouts.completion_mask]).double()

    sums = _sums(groups, group, stale)
    parts = sorted(set(world.gather(list(scored.parts))))  # a process without samples has none
    for name in parts:
        known = [v for v in scored.parts.get(name, []) if not math.isnan(v)]
        sums |= {f"sum/{name}": math.fsum(known), f"count/{name}": float(len(known))}
    total = dict(zip(sums, world.sum(*sums.values()), strict=True))

    # The minimum is -max(-x): `World` has a maximum only.
    ends = (-math.inf,) * 3
    if stale.numel():
        ends = (float(length.max()), -float(length.min()), float(stale.max()))
    longest, shortest, oldest = world.max(*ends)

    metrics = ratios(ROLLOUT_METRICS, total) | {
        "rollout/tokens": total["tokens"],
        "completions/max_length": longest,
        "completions/min_length": -shortest,
        "sampler/staleness_max": oldest,
    }
    return metrics | {name: _mean(total[f"sum/{name}"], total[f"count/{name}"]) for name in parts}


def _sums(groups: SampledGroups, group: int, stale: Tensor) -> dict[str, float]:
    """This process's sums and counts, under the keys of ROLLOUT_METRICS."""
    rollouts, reward = groups.rollouts, groups.reward
    table = reward.view(-1, group).double()
    known = ~reward.isnan()
    cut = torch.tensor([r == "length" for r in rollouts.finish_reason], device=reward.device)
    columns = {
        "known": known,
        "tokens": rollouts.lengths.double(),
        "reward": reward.nan_to_num(0),
        "reward_std": _std(table),
        "flat": ~has_signal(reward, group),
        "cut": cut,
        "entropy": rollouts.entropy,
        "stale": stale,
    }
    counts = {"samples": float(len(rollouts)), "groups": float(len(table))}
    return counts | {name: float(column.sum()) for name, column in columns.items()}


def has_signal(reward: Tensor, group: int) -> Tensor:
    """(P,) bool: whether each group has at least two different rewards; NaN is ignored."""
    table = reward.view(-1, group)
    return table.nan_to_num(-torch.inf).amax(1) > table.nan_to_num(torch.inf).amin(1)


def _mean(total: float, count: float) -> float:
    """NaN, which the log writes as null, where there is nothing to average: 0 would look like a result."""
    return total / count if count else math.nan


def _std(groups: Tensor) -> Tensor:
    """Standard deviation of each group's rewards that are not NaN; 0 for fewer than two of them."""
    n = (~groups.isnan()).sum(1)
    mean = groups.nansum(1) / n.clamp_min(1)
    centred = torch.where(groups.isnan(), 0, groups - mean[:, None])
    return (centred.square().sum(1) / (n - 1).clamp_min(1)).sqrt()
