"""PPO's batches: rollouts whose tokens have rewards, values, advantages and returns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from fastrl.algorithms.ppo import ActorCriticAlgorithm, Coefficient, advantages, kl_of_tokens, token_rewards
from fastrl.batch.types import Batch
from fastrl.config import Ppo
from fastrl.methods.grpo.draw import Draw
from fastrl.methods.grpo.rollouts import OnPolicy, Step
from fastrl.methods.ppo.learner import PpoLearner
from fastrl.parallel.world import World
from fastrl.sampler import Sampler

# logged as critic/NAME/mean, max and min over tokens, as in verl
SPREADS = (
    "returns",
    "values",
    "advantages",
)


class PpoSource(OnPolicy):
    """`OnPolicy` with a critic: advantages per token from the learner's values, and the KL's coefficient,
    fixed or adapted.

    A completion's reward stands at its last token that counts.  One that was cut off ends there too (its
    verifier has judged it as it is), unless config.bootstrap says that it goes on.  A completion without a
    reward (NaN) leaves the loss.
    """

    def __init__(
        self,
        learner: PpoLearner,
        config: Ppo,
        sampler: Sampler,
        algorithm: ActorCriticAlgorithm,
        **options: Any,
    ) -> None:
        super().__init__(config, sampler, algorithm.policy, **options)
        self.learner, self.row, self.ppo = learner, algorithm, config
        start = algorithm.reward_kl_coef or algorithm.policy.kl_coef
        self.coefficient = Coefficient(start, config.kl_target, config.kl_horizon)
        self._measured: dict[str, float] = {}

    def collect(self, step: int, version: int) -> Step:
        """The step's batches under the coefficient as it is;
        what they show of the KL moves it for the next.
        """
        if self.row.policy.kl_coef:
            policy = replace(self.row.policy, kl_coef=self.coefficient.value)
            self.learner.algorithm = replace(self.row, policy=policy)
        done = super().collect(step, version)
        # a group of one has no spread to speak of
        alone = ("reward_std", "frac_reward_zero_std") if self.ppo.group == 1 else ()
        metrics = {name: x for name, x in done.metrics.items() if name not in alone}
        return replace(done, metrics=metrics | self._measured)

    def state(self) -> dict[str, Tensor]:
        """The groups that were carried over, and the KL's coefficient."""
        return super().state() | {"kl_coef": torch.tensor(self.coefficient.value, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        state = dict(state)
        if "kl_coef" in state:
            self.coefficient.value = float(state.pop("kl_coef"))
        super().load_state(state)

    def _advantage(self, draw: Draw, own: list[int]) -> Tensor:
        """The scores of the samples `own`, which `_batch` turns into advantages."""
        score = draw.reward[own]
        cut = self._cut(draw, own)
        return score - self.ppo.missing_eos_penalty * cut

    def _batch(self, draw: Draw, own: list[int], advantage: Tensor) -> Batch:
        batch = super()._batch(draw, own, advantage)
        known = torch.repeat_interleave(~advantage.isnan(), batch.cu_seqlens.diff().long())
        batch = replace(batch, mask=batch.mask & known)
        kl = (
            None
            if batch.ref_logp is None
            else kl_of_tokens(batch.old_logp, batch.ref_logp, self.row.reward_kl)
        )
        inside = kl if self.row.reward_kl_coef else None
        reward = token_rewards(
            advantage.nan_to_num(0), inside, self.coefficient.value, batch.live_ends, batch.mask
        )
        values = self.learner.values(batch)
        end = (
            self._cut(draw, own) * self.row.gamma * values.last
            if self.ppo.bootstrap
            else torch.zeros_like(advantage)
        )
        going_on = reward + token_rewards(end.to(reward.dtype), None, 0.0, batch.live_ends, batch.mask)
        found, returns = advantages(
            going_on, values.before, batch.cu_seqlens, batch.mask, self.row, self.world.sum
        )
        batch = replace(batch, advantage=found, value=values.before, returns=returns)
        self._measured = measure(batch, reward, advantage, kl, self.world)
        if self.row.needs_reference:
            self._measured["objective/kl_coef"] = self.coefficient.value
            self.coefficient.observe(self._measured["objective/kl"], self._measured["objective/completions"])
        del self._measured["objective/completions"]
        return batch

    def _cut(self, draw: Draw, own: list[int]) -> Tensor:
        """(S,) 1 for the samples `own` that were cut off, 0 for those that ended."""
        reasons = draw.rollouts.finish_reason
        return torch.tensor([float(reasons[i] != "stop") for i in own], device=draw.reward.device)

    def _live(self, batch: Batch) -> Batch:
        """Every sample: the critic learns from those without advantage too."""
        return batch


def measure(batch: Batch, reward: Tensor, score: Tensor, kl: Tensor | None, world: World) -> dict[str, float]:
    """What the critic knew of the batch, and the objective, over all processes: under TRL's names, and verl's
    for the critic.

    objective/kl is nats per completion, k1 summed over its tokens; kl is nats per token, k3.
    """
    mask, live = batch.mask, batch.live_ends.diff() > 0
    columns = {"returns": batch.returns, "values": batch.value, "advantages": batch.advantage}
    picked = {name: cast(Tensor, columns[name])[mask].double() for name in SPREADS}
    n, completions, scores, rewards, *sums = world.sum(
        *(float(x.sum()) for x in (mask, live, score[live].double(), reward.double(), *picked.values()))
    )
    ends = world.max(
        *(float(f(x)) if x.numel() else -math.inf for x in picked.values() for f in (torch.max, _lowest))
    )
    mean = {name: total / max(n, 1) for name, total in zip(SPREADS, sums, strict=True)}
    out = {f"critic/{name}/mean": x for name, x in mean.items()}
    for i, name in enumerate(SPREADS):
        out |= {f"critic/{name}/max": ends[2 * i], f"critic/{name}/min": -ends[2 * i + 1]}
    gap = picked["returns"] - picked["values"]
    offset = mean["returns"] - mean["values"]
    spread, missed = world.sum(
        float((picked["returns"] - mean["returns"]).square().sum()), float((gap - offset).square().sum())
    )
    out["critic/vf_explained_var"] = 1 - missed / spread if spread > 0 else math.nan
    count = max(completions, 1)
    out |= {
        "objective/scores": scores / count,
        "objective/rlhf_reward": rewards / count,
        "objective/completions": completions,
    }
    if kl is None or batch.ref_logp is None:
        return out
    e = (batch.old_logp - batch.ref_logp)[mask].double()
    k1, k3 = world.sum(float(e.sum()), float((torch.expm1(-e) + e).sum()))
    return out | {
        "objective/kl": k1 / count,
        "kl": k3 / max(n, 1),
        "objective/non_score_reward": (rewards - scores) / count,
    }


def _lowest(x: Tensor) -> Tensor:
    return -x.min()
