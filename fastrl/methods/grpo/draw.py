"""What was drawn for a training step: completions with their rewards, and what is reported of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.batch.types import Rollouts
from fastrl.methods.grpo.refill import spread
from fastrl.parallel.world import World
from fastrl.report.metric import ratios
from fastrl.report.metrics import ROLLOUT_METRICS
from fastrl.rewards.functions import Scored


@dataclass(frozen=True, slots=True)
class Draw:
    """Completions of this process's share of some prompts, group by group.

    items    prompt and columns of each completion
    places   of its groups among all that were drawn in the step
    prompts  drawn by all processes
    numbers  of its groups' prompts among all there are
    """

    items: list[tuple[Any, Mapping[str, Any]]]
    rollouts: Rollouts
    scored: Scored
    places: list[int]
    prompts: int
    numbers: list[int]

    @property
    def reward(self) -> Tensor:
        """(S,) fp32, NaN where no reward applies."""
        return torch.tensor(self.scored.reward, dtype=torch.float32, device=self.rollouts.tokens.device)

    @staticmethod
    def join(rounds: Sequence[Draw]) -> Draw:
        return Draw(
            [item for r in rounds for item in r.items],
            Rollouts.join([r.rollouts for r in rounds]),
            Scored.join([r.scored for r in rounds]),
            [place for r in rounds for place in r.places],
            sum(r.prompts for r in rounds),
            [n for r in rounds for n in r.numbers],
        )

    def samples(self, group: int) -> list[dict[str, Any]]:
        """The first group's completions, at most four, as samples.jsonl has them."""
        text = self.rollouts.text or [str(t) for t in self.rollouts.completions()]
        scored = self.scored
        told: dict[str, list[Any]] = {
            "completion": text,
            "reward": scored.reward,
            "message": scored.message,
            **scored.extra,
        }
        few = range(min(4, group, len(self.items)))
        return [
            {"prompt": self.items[i][0]} | {name: values[i] for name, values in told.items() if values}
            for i in few
        ]


def measure(draw: Draw, group: int, version: int, world: World) -> dict[str, float]:
    """Means over all processes and all that was drawn, under TRL's names; rewards that are not applicable
    (NaN) are left out.
    """
    rollouts, reward, scored = draw.rollouts, draw.reward, draw.scored
    G, length = group, rollouts.lengths.double()
    stale = (version - rollouts.weight_version[rollouts.completion_mask]).double()
    groups = reward.view(-1, G).double()
    known = ~reward.isnan()
    cut = torch.tensor([r == "length" for r in rollouts.finish_reason], device=reward.device)
    sums = {
        "samples": float(len(rollouts)),
        "known": float(known.sum()),
        "groups": float(len(groups)),
        "tokens": float(length.sum()),
        "reward": float(reward.nan_to_num(0).sum()),
        "reward_std": float(_std(groups).sum()),
        "flat": float((~spread(reward, G)).sum()),
        "cut": float(cut.sum()),
        "entropy": float(rollouts.entropy.sum()),
        "stale": float(stale.sum()),
    }
    parts = sorted(set(world.gather(list(scored.parts))))  # a process without samples has none
    for name in parts:
        there = [v for v in scored.parts.get(name, []) if not math.isnan(v)]
        sums |= {f"sum/{name}": math.fsum(there), f"count/{name}": float(len(there))}
    total = dict(zip(sums, world.sum(*sums.values()), strict=True))
    ends = (
        (float(length.max()), -float(length.min()), float(stale.max())) if stale.numel() else (-math.inf,) * 3
    )
    longest, shortest, oldest = world.max(*ends)
    ends_and_counts = {
        "completions/max_length": longest,
        "completions/min_length": -shortest,
        "rollout/tokens": total["tokens"],
        "sampler/staleness_max": oldest,
    }
    by_function = {k: _mean(total[f"sum/{k}"], total[f"count/{k}"]) for k in parts}
    return ratios(ROLLOUT_METRICS, total) | ends_and_counts | by_function


def _mean(total: float, count: float) -> float:
    """NaN, which the log writes as null, where there is nothing to average: 0 would look like a result."""
    return total / count if count else math.nan


def _std(groups: Tensor) -> Tensor:
    """Standard deviation of each group's rewards that are not NaN; 0 for fewer than two of them."""
    n = (~groups.isnan()).sum(1)
    mean = groups.nansum(1) / n.clamp_min(1)
    centred = torch.where(groups.isnan(), 0, groups - mean[:, None])
    return (centred.square().sum(1) / (n - 1).clamp_min(1)).sqrt()
