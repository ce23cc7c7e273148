"""PPO restated: padded (S, L) float64 matrices and loops over time, differentiated by autograd.  Nothing is
shared with the code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from contexts import context_of
from runs import GROUP, PROMPTS, SCORES, TEMPERATURE, grpo, leave_gradient, on_policy, reference
from torch import Tensor

from fastrl.algorithms.ppo import PPO, ActorCriticAlgorithm, Coefficient
from fastrl.config import Optim, Ppo
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.methods.ppo import method
from fastrl.methods.ppo.batches import Credit, PpoRollouts
from fastrl.methods.ppo.learner import ActorCritic
from fastrl.methods.ppo.objective import ActorCriticBatch
from fastrl.model.critic import Critic
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World


def pad(x: Tensor, cu: Tensor) -> Tensor:
    """Packed (T,) as (S, L), zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(
        [x[a:b].double() for a, b in itertools.pairwise(cu)], batch_first=True
    )


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Backwards, token by token; what is masked out is stepped over."""
    advantage = torch.zeros_like(reward)
    for s in range(reward.shape[0]):
        following, carried = 0.0, 0.0
        for t in reversed(range(reward.shape[1])):
            if mask[s, t]:
                carried = (
                    float(reward[s, t].detach())
                    + gamma * following
                    - float(value[s, t].detach())
                    + gamma * lam * carried
                )
                following = float(value[s, t].detach())
                advantage[s, t] = carried
    return advantage, torch.where(mask, advantage + value, 0)


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    live = x[mask]
    return torch.where(mask, (x - live.mean()) / (live.var() + 1e-8).sqrt(), 0)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum() / mask.sum()


def policy(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor, cap: float = math.inf) -> Tensor:
    """Dual-clip PPO as published: max(min(r A, clip(r) A), c A) where A < 0."""
    r = (logp - old).exp()
    inner = torch.minimum(r * A, r.clamp(0.8, 1.2) * A)
    inner = torch.where(A < 0, torch.maximum(inner, cap * A), inner) if math.isfinite(cap) else inner
    return -mean(inner, mask)


def critic(value: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    held = torch.maximum(torch.minimum(value, old + clip), old - clip)
    return 0.5 * mean(torch.maximum((value - returns) ** 2, (held - returns) ** 2), mask)


# --- what the tests of PPO share ----------------------------------------------------------------------
def row(**changes: Any) -> ActorCriticAlgorithm:
    """The ppo row with changes of its own fields, or of its policy's."""
    base = PPO["ppo"]
    own = {name: changes.pop(name) for name in [*changes] if hasattr(base, name) and name != "kl_coef"}
    return replace(base, policy=replace(base.policy, **changes), **own)


def learner(
    model: Decoder,
    of: ActorCriticAlgorithm,
    micro_tokens: int = 10**6,
    world: World | None = None,
    **optim: Any,
) -> ActorCritic:
    """A run's learner, whose critic's head is not at zero, where every value would be."""
    config = Ppo(model="", steps=10, micro_tokens=micro_tokens, optim=Optim(**optim))
    made = method.learner(context_of(config, of, model, world=world, temperature=TEMPERATURE))

    head = critic_of(made).head if made.critic is not None else made.head
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=noise) * 0.2)
        head.bias.fill_(0.3)
    return made


def algorithm_of(made: ActorCritic) -> ActorCriticAlgorithm:
    """The row that the learner trains by."""
    objective: Any = made.policy.objective
    return objective.algorithm


def policy_of(made: ActorCritic) -> Decoder:
    """The policy that the learner trains."""
    objective: Any = made.policy.objective
    return objective.policy.model


def critic_of(made: ActorCritic) -> Critic:
    """The critic that is a model of its own."""
    objective: Any = made.critic.objective
    return objective.critic


def source(made: ActorCritic, scores: Any = SCORES, **changes: Any) -> PpoRollouts:
    """Rollouts of the learner's policy for PROMPTS, scored by `scores` whatever they are, `GROUP` of each."""
    of, world = algorithm_of(made), made.policy.world
    plain = on_policy(policy_of(made), of.policy, scores=scores, world=world)
    options: dict[str, Any] = {
        "model": "",
        "prompts": len(PROMPTS),
        "group": GROUP,
        "max_new_tokens": 9,
        "seed": 2,
    } | changes
    config = Ppo(**options, sampling=plain.config.sampling)

    start = of.reward_kl_coef or of.policy.kl_coef
    coefficient = Coefficient(start, config.kl_target, config.kl_horizon)
    credit = Credit(config, of, made.values, coefficient, world)
    extra = ExtraLogProbs(reference if of.needs_reference else None, plain.extra.trainer, of.correction)
    groups = GroupSampler(config, plain.groups.sampler, plain.groups.prompts, world)
    rollouts = RolloutSource(config, groups, extra, credit.shaping(), world)
    return PpoRollouts(rollouts, config, bool(of.policy.kl_coef), coefficient)


def batch_of(made: ActorCritic, **changes: Any) -> ActorCriticBatch:
    return source(made, **changes).collect(0, 0).batches[0]


def gradients(made: ActorCritic, batch: ActorCriticBatch) -> tuple[dict[str, float], Tensor, Tensor]:
    """The step's metrics, the gradient of the policy's weights and that of the critic's own (or of the
    head).
    """
    metrics, weights = leave_gradient(made.policy, batch), made.policy.weights
    named = list(zip(weights.names, weights.masters, strict=True))
    own = [p for name, p in named if not name.startswith("beside")]
    beside = [p for name, p in named if name.startswith("beside")]
    if made.critic is not None:
        metrics = metrics | leave_gradient(made.critic, batch.tokens)
        beside = made.critic.weights.masters
    flat = [
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
        for some in (own, beside)
    ]
    for p in (*own, *beside):
        p.grad = None
    return metrics, *flat


def ppo(folder: Path, name: str = "run", **changes: Any) -> Ppo:
    """A run of 20 steps on a reward that random weights can climb."""
    base = grpo(folder, name)
    shared = {f.name for f in fields(base)} & {f.name for f in fields(Ppo)} - {"algorithm", "group"}
    kept = {name: getattr(base, name) for name in shared}
    return Ppo(**kept | {"optim": Optim(lr=3e-3, warmup=2), "critic_lr": None} | changes)
