"""A group's completions against each other: rollouts whose advantage column is their reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.algorithms.group_preference import GroupPreference
from fastrl.batch.types import Batch
from fastrl.config import Hybrid
from fastrl.methods.grpo.groups import SampledGroups
from fastrl.methods.grpo.rollouts import Shaping
from fastrl.methods.grpo.shaping import unchanged
from fastrl.parallel.world import World
from fastrl.train.source import Metrics


@dataclass(frozen=True, slots=True)
class Contrast:
    """Keeps whole prompts, and of each the completions that the algorithm compares."""

    config: Hybrid
    algorithm: GroupPreference
    world: World

    def shaping(self) -> Shaping:
        """Rewards in place of advantages, and weights of what is compared."""
        return Shaping(
            extend=unchanged,
            credit=self.credit,
            columns=self.columns,
            weigh=self.weigh,
            prune=lambda batch: batch,
        )

    def credit(self, groups: SampledGroups, samples: list[int]) -> tuple[list[int], Tensor]:
        """The completions that are compared, with their rewards; NaN for one that does not count."""
        rollouts, reward = groups.rollouts, groups.reward
        cut = [self.config.overlong_filter and reason == "length" for reason in rollouts.finish_reason]
        gone = (rollouts.lengths == 0) | torch.tensor(cut, dtype=torch.bool, device=reward.device)
        credit = torch.where(gone, torch.nan, reward)[samples]

        size = self.config.group
        kept = self.algorithm.kept(credit.view(-1, size))
        first = size * torch.arange(len(kept), device=kept.device)[:, None]
        at = (kept + first).flatten()
        return [samples[i] for i in at.tolist()], credit[at]

    def columns(
        self, batch: Batch, groups: SampledGroups, samples: list[int], credit: Tensor
    ) -> tuple[Batch, Metrics]:
        """The batch, its own old log-probs as the reference's where the algorithm compares with those."""
        if self.algorithm.anchor == "old":
            batch = replace(batch, ref_logp=batch.old_logp)
        return batch, {}

    def weigh(self, part: Batch) -> Batch:
        """The weights of the groups with something to compare; the others leave the batch."""
        unit = self.algorithm.unit
        first = part.cu_seqlens[:-1].long()
        units = self.algorithm.units(part.advantage[first].view(-1, unit))
        (count,) = self.world.sum(float(units.sum()))

        groups = units.nonzero().flatten().tolist()
        kept = [group * unit + i for group in groups for i in range(unit)]
        part = part if len(kept) == len(part) else part.select(kept)
        return replace(part, weight=torch.full_like(part.weight, 1 / max(count, 1)))
