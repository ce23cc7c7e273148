"""What the tests of joint training share: small runs, a source without a run around it, and the outer step
restated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from configs import configured
from contexts import context_of
from judging import restated
from runs import REWARDS, decoder, write, write_model
from torch import Tensor

from fastrl.config import Joint, Optim
from fastrl.methods.grpo.prompts import Prompts
from fastrl.methods.joint import method
from fastrl.methods.joint.batches import JointRollouts
from fastrl.methods.joint.learner import JointLearner
from fastrl.methods.joint.options import choose_joint
from fastrl.model.decoder import Decoder
from fastrl.model.reward import RewardModel
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored

PROMPTS, GROUP = ("7>5|", "a:63>9|", "2", "Q>1"), 4
ORACLE = [1.0, 0.0, 0.5, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0, math.nan, 1.0, 0.25, 1.0, math.nan, math.nan, math.nan]


def joint(folder: Path, name: str = "run", **changes: Any) -> Joint:
    """A run on an oracle that random weights can climb, its reward model random at the start."""
    write(folder / "rewards.py", REWARDS)
    options: dict[str, Any] = {
        "model": changes.pop("model", None) or write_model(folder),
        "task": "cards",
        "task_options": ("k=2",),
        "output_dir": str(folder / name),
        "steps": 5,
        "prompts": 4,
        "group": GROUP,
        "max_new_tokens": 8,
        "micro_tokens": 96,
        "reward": (f"{folder}/rewards.py:digits",),
        "optim": Optim(lr=1e-2, warmup=2),
    }
    return configured(Joint, **options | changes)


def training(
    folder: Path,
    oracle: Sequence[float] = ORACLE,
    *,
    dtype: torch.dtype = torch.float64,
    world: World | None = None,
    **changes: Any,
) -> tuple[JointLearner, JointRollouts]:
    """A run's learner and its rollouts for PROMPTS, judged by `oracle` whatever they are, from a policy and a
    reward model of random weights.
    """
    config = joint(folder, **{"micro_tokens": 10**6, "max_new_tokens": 6} | changes)
    config = replace(config, steps=10, optim=replace(config.optim, warmup=0))
    context = context_of(config, choose_joint(config), decoder(dtype=dtype), world=world)

    def score(prompts: Sequence[Any], texts: Any, tokens: Any, columns: Sequence[Any]) -> Scored:
        return Scored([oracle[c["id"] * GROUP + i % GROUP] for i, c in enumerate(columns)])

    prompts = Prompts(lambda i: (PROMPTS[i], {"id": i}), len(PROMPTS), score)
    learner = method.learner(context)
    with mock.patch.object(method, "prompts_of", lambda *given: prompts):
        it: Any = method.source(context, learner)[0]
    return learner, it


def policy_of(learner: JointLearner) -> Decoder:
    """The policy that the learner trains."""
    objective: Any = learner.policy.objective
    return objective.model


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# --- the outer step by another hand: one sequence at a time, through whole logits ---------------------
def score_of(model: RewardModel, tokens: Sequence[int]) -> Tensor:
    """The head on the last of the sequence's own hidden states."""
    return model.body(torch.tensor(tokens))[-1] @ model.head[0]


def standardised(scores: Sequence[float], among: Sequence[float]) -> list[float]:
    mean = sum(among) / len(among)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in among) / len(among))
    return [(s - mean) / deviation for s in scores]


def advantage(rewards: Sequence[float]) -> list[float]:
    """GRPO's, group by group."""
    out: list[float] = []
    for g in range(0, len(rewards), GROUP):
        some = rewards[g : g + GROUP]
        mean = sum(some) / GROUP
        deviation = math.sqrt(sum((r - mean) ** 2 for r in some) / (GROUP - 1))
        out += [(r - mean) / (deviation + 1e-4) for r in some]
    return out


def policy_gradient(model: Any, sequences: Sequence[tuple[list[int], int]], A: Sequence[float]) -> Tensor:
    """Of -1/S sum_i A_i mean_t logp, sequences given as (tokens, tokens of the prompt): what GRPO's loss is
    before any update.
    """
    loss = torch.zeros((), dtype=torch.float64)
    for (tokens, prompt), a in zip(sequences, A, strict=True):
        row = torch.tensor(tokens)
        logp = (model(row) @ model.head_weight.T).log_softmax(-1)
        loss = loss - a * logp[torch.arange(prompt - 1, len(tokens) - 1), row[prompt:]].mean() / len(
            sequences
        )
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def reward_gradient(
    model: RewardModel, name: str, groups: Sequence[tuple[list[list[int]], list[float]]], center: float
) -> Any:
    """Loss of comparisons, (sequences, oracle) of every group, by the equations of judging.py; and its
    gradient.
    """
    scores = [[score_of(model, tokens) for tokens in sequences] for sequences, _ in groups]
    told = [([s.item() for s in own], y, 0.0) for own, (_, y) in zip(scores, groups, strict=True)]
    loss, slope = restated(name, told, center)
    total = sum(d * s for d, s in zip(slope, [s for own in scores for s in own], strict=True))
    return loss, flat(torch.autograd.grad(total, list(model.parameters())))


# --- over-optimisation in a page: a softmax bandit, and a linear probe for its reward model -----------
# an answer's length is 0 to 9; longer is better up to 5, and beyond that it is worth nothing
LONGEST, LIMIT = (
    9,
    5,
)
FEATURES = torch.tensor([[n / LONGEST, float(n > LIMIT)] for n in range(LONGEST + 1)], dtype=torch.float64)
TRUTH = torch.tensor([n / LIMIT if n <= LIMIT else 0.0 for n in range(LONGEST + 1)], dtype=torch.float64)


def bandit(
    learn: Callable[[Tensor, Tensor, Tensor], None],
    rewards: Callable[[Tensor, Tensor], Tensor],
    advantages: Any,
    *,
    together: bool,
) -> list[tuple[float, float]]:
    """(proxy, oracle) of each step of a policy that begins with short answers, by a reward model that has
    learned from those.

    learn(probe, actions, oracle) updates the probe (2,) on groups of answers; rewards(probe, actions) -> what
    the policy is given.
    """
    noise = torch.Generator().manual_seed(0)
    logits = -0.4 * torch.arange(LONGEST + 1, dtype=torch.float64)
    probe = torch.zeros(2, dtype=torch.float64)

    for _ in range(100):  # before: answers within the limit alone
        actions = torch.randint(LIMIT + 1, (128,), generator=noise)
        learn(probe, actions, TRUTH[actions])
    told = []
    for _ in range(300):
        actions = torch.multinomial(
            logits.softmax(0).expand(16, -1), 8, replacement=True, generator=noise
        ).flatten()
        reward = rewards(probe, actions)
        A = advantages(reward, 8)
        told.append(
            (float((logits.softmax(0) * (FEATURES @ probe)).sum()), float((logits.softmax(0) * TRUTH).sum()))
        )
        score = torch.nn.functional.one_hot(actions, LONGEST + 1).double() - logits.softmax(0)
        logits = logits + 0.3 * (A[:, None] * score).mean(0)
        if together:
            learn(probe, actions, TRUTH[actions])
    return told
