"""PPO: rewards per token, advantages per token from a critic, and the critic's own loss.  The equations are
in docs/ppo.md.

A row holds a policy algorithm of objective.py, its advantage left to GAE, and the critic's settings; nothing
branches on its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.aggregate import token_mean
from fastrl.algorithms.objective import Algorithm, HoldsPolicy
from fastrl.algorithms.presets import Columns, clip
from fastrl.kernels.surrogates import KLS

Sum = Callable[..., list[float]]
"""Numbers -> each summed over all processes: `World.sum`."""
KL_COEF = 0.05
VF_COEF = 0.1


# --- rows -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCriticAlgorithm(HoldsPolicy):
    """A method with a critic.

    policy       trains the policy on GAE's advantages
    gamma, lam   discount per token, and lambda of GAE
    whiten       whether advantages are scaled to mean 0 and deviation 1 over the tokens of the step
    reward_kl, reward_kl_coef
                 estimator and weight of a KL inside the reward; a reference model is kept if this weight or
                 the policy's is not 0
    value_clip   how far a value may move from the one at sampling, inf for any distance
    vf_coef      weight of the value loss where critic and policy share an optimizer
    critic, critic_model, critic_lr
                 a row of fastrl.methods.ppo.learner.CRITICS; the folder it starts from and its learning rate,
                 None for the policy's
    """

    policy: Algorithm
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    reward_kl: str = "k1"
    reward_kl_coef: float = 0.0
    value_clip: float = 0.2
    vf_coef: float = VF_COEF
    critic: str = "separate"
    critic_model: str | None = None
    critic_lr: float | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward uses log-probs of a reference model."""
        return bool(self.policy.kl_coef or self.reward_kl_coef)


_CLIPPED = Algorithm(**clip(0.2, 0.2), aggregate=token_mean, kl="k2")
_DUAL_CLIPPED = replace(_CLIPPED, **clip(0.2, 0.2, 3.0))
PPO: dict[str, ActorCriticAlgorithm] = {
    "ppo": ActorCriticAlgorithm(policy=_CLIPPED),
    "dual_clip": ActorCriticAlgorithm(policy=_DUAL_CLIPPED),
}


class Preset(NamedTuple):
    """What another trainer's PPO changes: columns of the policy's algorithm, and of the row itself."""

    policy: Columns
    row: Columns


SEMANTICS: Mapping[str, Preset] = {
    "paper": Preset({}, {}),
    "trl": Preset({}, {}),
    "verl": Preset(clip(0.2, 0.2, 3.0), {"value_clip": 0.5, "lam": 1.0}),
}


# --- rewards and advantages -------------------------------------------------------------------------
def kl_of_tokens(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """(T,) KL to the reference at each sampled token, nats, by an estimator of KLS under the policy that
    sampled it.
    """
    return KLS[estimator](logp - ref_logp, torch.zeros_like(logp))[0]


def token_rewards(
    score: Tensor, kl: Tensor | None, kl_coef: float, live_ends: Tensor, mask: Tensor
) -> Tensor:
    """Rewards of packed tokens: -kl_coef kl at each masked-in token, and the completion's score at its last.

    Shapes:  score (S,), kl (T,) or None, live_ends (S+1,) (see `Batch.live_ends`), mask (T,) bool  ->  (T,),
             0 where masked out.
    """
    reward = torch.zeros(mask.shape, dtype=score.dtype, device=score.device)
    if kl is not None:
        reward = torch.where(mask, -kl_coef * kl.to(score.dtype), reward)
    present = live_ends.diff() > 0
    last = mask.nonzero().squeeze(1)[live_ends[1:][present].long() - 1]
    return reward.index_add(0, last, score[present])


def whiten(x: Tensor, mask: Tensor, total: Sum) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the masked-in tokens of all processes; 0 elsewhere, and for a
    single token.

    The variance divides by N - 1.  Sums are float64, in two passes.
    """
    live = x[mask].double()
    n, first = total(float(live.numel()), float(live.sum()))
    mean = first / max(n, 1)

    local = (live - mean).square().sum()
    (squares,) = total(float(local))
    scale = (squares / max(n - 1, 1) + 1e-8) ** -0.5
    return torch.where(mask, (x.double() - mean) * scale, 0).to(x.dtype)


def advantages(
    reward: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    algorithm: ActorCriticAlgorithm,
    total: Sum,
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened if the algorithm asks for it, and returns (T,), which are computed before that; 0
    where masked out.
    """
    found = ops.gae(reward, value, cu_seqlens, gamma=algorithm.gamma, lam=algorithm.lam, mask=mask)
    advantage = whiten(found.advantage, mask, total) if algorithm.whiten else found.advantage
    return advantage, found.returns


@dataclass(slots=True)
class Coefficient:
    """The weight of the KL over the batches: constant, or adapted to a KL of `target` nats per completion.

    Source:  Ziegler et al. 2019, "Fine-tuning language models from human preferences" (arXiv 1909.08593),
             section 2.2.
    """

    value: float
    target: float | None = None
    horizon: int = 10000

    def observe(self, kl: float, completions: float) -> None:
        """Update after a batch of completions with a mean KL, summed over each one's tokens, of `kl` nats."""
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * completions / self.horizon


# --- the critic's loss ------------------------------------------------------------------------------
VALUE_SUMS = ("loss", "tokens", "clipped", "value")  # of `value_loss`: the weighted loss, then plain sums


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """sum weight 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), and VALUE_SUMS (4,)
    float64, detached.

    Where the second is the larger the gradient is 0: the value has already moved far enough towards R.
    Shapes:  all (N,); differentiable in `value`.
    Source:  the PPO authors' implementation (openai/baselines, ppo2); TRL and verl use the same form.
    """
    old_value, returns, weight = (x.to(value.dtype) for x in (old_value, returns, weight))
    free = (value - returns).square()
    held = (old_value + (value - old_value).clamp(-clip, clip) - returns).square()
    loss = 0.5 * (weight * torch.maximum(free, held)).sum()
    with torch.no_grad():
        n = loss.new_full((), value.numel())
        sums = torch.stack([loss, n, (held > free).sum().to(loss.dtype), value.sum()])
    return loss, sums.detach().double()
