"""PPO's batches: rollouts whose tokens have rewards, values, advantages and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fastrl.algorithms.ppo import (
    ActorCriticAlgorithm,
    Coefficient,
    advantages,
    kl_of_tokens,
    token_rewards,
)
from fastrl.batch.types import Batch
from fastrl.config import Ppo
from fastrl.methods.grpo.groups import SampledGroups
from fastrl.methods.grpo.rollouts import RolloutSource, Shaping
from fastrl.methods.grpo.shaping import unchanged
from fastrl.methods.ppo.objective import ActorCriticBatch, Values
from fastrl.parallel.world import World
from fastrl.train.source import Metrics, State, Step
from fastrl.train.weighting import weigh

SPREADS = (
    "returns",
    "values",
    "advantages",
)  # logged as critic/NAME/mean, max and min over tokens, as in verl


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantages per token, from a critic's values, with the KL's coefficient, fixed or adapted.

    A completion's reward stands at its last token that counts.  One that was cut off ends there too (its
    verifier has judged it as it is), unless config.bootstrap says that it goes on.  A completion without a
    reward (NaN) leaves the loss.
    """

    config: Ppo
    algorithm: ActorCriticAlgorithm
    values: Callable[[Batch], Values]
    coefficient: Coefficient
    world: World

    def shaping(self) -> Shaping:
        """This credit; every sequence stays in the batch, because the critic learns from all of them."""
        policy, longest = self.algorithm.policy, self.config.max_new_tokens
        return Shaping(
            extend=unchanged,
            credit=self.scores,
            columns=self.columns,
            weigh=lambda part: weigh(part, policy, self.world, max_length=longest),
            prune=lambda part: part,
        )

    def scores(self, groups: SampledGroups, samples: list[int]) -> tuple[list[int], Tensor]:
        """The rewards of the samples, less the penalty of those that were cut off."""
        cut = _cut(groups, samples)
        return samples, groups.reward[samples] - self.config.missing_eos_penalty * cut

    def columns(
        self, batch: Batch, groups: SampledGroups, samples: list[int], score: Tensor
    ) -> tuple[Batch, Metrics]:
        """The batch with values, returns and advantages; what they show of the KL moves its coefficient."""
        algorithm = self.algorithm
        batch = replace(batch, mask=batch.mask & batch.per_token(~score.isnan())).with_known()

        kl = None
        if batch.ref_logp is not None:
            kl = kl_of_tokens(batch.old_logp, batch.ref_logp, algorithm.reward_kl)
        inside = kl if algorithm.reward_kl_coef else None
        coef, ends = self.coefficient.value, batch.live_ends
        reward = token_rewards(score.nan_to_num(0), inside, coef, ends, batch.mask)

        values = self.values(batch)
        end = torch.zeros_like(score)
        if self.config.bootstrap:  # a completion that was cut off goes on
            end = _cut(groups, samples) * algorithm.gamma * values.last
        going_on = reward + token_rewards(end.to(reward.dtype), None, 0.0, ends, batch.mask)

        advantage, returns = advantages(
            going_on, values.before, batch.cu_seqlens, batch.mask, algorithm, self.world.sum
        )
        batch = replace(batch, advantage=advantage, value=values.before, returns=returns)
        metrics, completions = value_metrics(batch, reward, score, kl, self.world)
        if algorithm.needs_reference:
            metrics["objective/kl_coef"] = coef
            self.coefficient.observe(metrics["objective/kl"], completions)
        return batch, metrics


@final
class PpoRollouts:
    """Rollouts, each batch with the KL's coefficient as it was when they were sampled."""

    def __init__(self, rollouts: RolloutSource, config: Ppo, in_loss: bool, coefficient: Coefficient) -> None:
        self.rollouts, self.config = rollouts, config
        self.in_loss, self.coefficient = in_loss, coefficient

    def collect(self, step: int, version: int) -> Step[ActorCriticBatch]:
        """The step's batches under the coefficient as it is."""
        kl_coef = self.coefficient.value if self.in_loss else 0.0
        sampled = self.rollouts.collect(step, version)

        metrics = sampled.metrics
        if self.config.group == 1:  # one sample has no standard deviation
            of_groups = ("reward_std", "frac_reward_zero_std")
            metrics = {name: x for name, x in metrics.items() if name not in of_groups}
        batches = [ActorCriticBatch(batch, kl_coef) for batch in sampled.batches]
        return Step(batches, metrics, sampled.samples)

    def state(self) -> State:
        """The groups that wait for the next step, and the KL's coefficient."""
        value = torch.tensor(self.coefficient.value, dtype=torch.float64)
        return self.rollouts.state() | {"kl_coef": value}

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        state = dict(state)
        if "kl_coef" in state:
            self.coefficient.value = float(state.pop("kl_coef"))
        self.rollouts.load_state(state)


def _cut(groups: SampledGroups, samples: list[int]) -> Tensor:
    """(S,) 1 for the samples that were cut off, 0 for those that ended."""
    reasons = groups.rollouts.finish_reason
    return torch.tensor([float(reasons[i] != "stop") for i in samples], device=groups.reward.device)


def value_metrics(
    batch: Batch, reward: Tensor, score: Tensor, kl: Tensor | None, world: World
) -> tuple[Metrics, float]:
    """What the critic knew of the batch, and the objective, over all processes; and the completions that
    count.

    Names are TRL's, and verl's for the critic.  objective/kl is nats per completion, k1 summed over its
    tokens; kl is nats per token, k3.
    """
    mask, live = batch.mask, batch.live_ends.diff() > 0
    assert batch.returns is not None and batch.value is not None
    columns = {"returns": batch.returns, "values": batch.value, "advantages": batch.advantage}
    picked = {name: columns[name][mask].double() for name in SPREADS}

    summed = (mask, live, score[live].double(), reward.double(), *picked.values())
    n, completions, scores, rewards, *sums = world.sum(*(float(x.sum()) for x in summed))
    mean = {name: total / max(n, 1) for name, total in zip(SPREADS, sums, strict=True)}

    metrics = _spreads(picked, mean, world)
    metrics["critic/vf_explained_var"] = _explained(picked, mean, world)
    count = max(completions, 1)
    metrics |= {"objective/scores": scores / count, "objective/rlhf_reward": rewards / count}
    if kl is None or batch.ref_logp is None:
        return metrics, completions

    drift = (batch.old_logp - batch.ref_logp)[mask].double()
    k1, k3 = world.sum(float(drift.sum()), float((torch.expm1(-drift) + drift).sum()))
    metrics |= {
        "objective/kl": k1 / count,
        "kl": k3 / max(n, 1),
        "objective/non_score_reward": (rewards - scores) / count,
    }
    return metrics, completions


def _spreads(picked: dict[str, Tensor], mean: Metrics, world: World) -> Metrics:
    """Mean, max and min over tokens of each column."""
    ends = [
        (float(x.max()), float(-x.min())) if x.numel() else (-math.inf, -math.inf) for x in picked.values()
    ]
    extremes = world.max(*(end for pair in ends for end in pair))

    metrics = {f"critic/{name}/mean": x for name, x in mean.items()}
    for name, highest, lowest in zip(SPREADS, extremes[::2], extremes[1::2], strict=True):
        metrics |= {f"critic/{name}/max": highest, f"critic/{name}/min": -lowest}
    return metrics


def _explained(picked: dict[str, Tensor], mean: Metrics, world: World) -> float:
    """The share of the returns' variance that the values explain; NaN where there is none."""
    gap = picked["returns"] - picked["values"]
    offset = mean["returns"] - mean["values"]
    spread, missed = world.sum(
        float((picked["returns"] - mean["returns"]).square().sum()), float((gap - offset).square().sum())
    )
    return 1 - missed / spread if spread > 0 else math.nan
