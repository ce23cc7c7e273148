"""The hybrids restated: lists of whole sequences in float64, one equation a row, differentiated by autograd;
and small mixtures to try.

Nothing of the equations is shared with the code under test: sums are written out, stops are detaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from configs import for_some_row
from runs import BUDGET, GROUP, PROMPTS, SEED, learner_of, reference, rollouts_of, scored_prompts
from torch import Tensor

from fastrl.algorithms.correction import CORRECTIONS
from fastrl.algorithms.hybrid import HYBRIDS, HybridAlgorithm
from fastrl.config import Hybrid
from fastrl.data.encode import Sample
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource, Shaping
from fastrl.methods.hybrid.members import Joining, Known
from fastrl.methods.hybrid.objective import HybridObjective
from fastrl.methods.hybrid.options import DEMO_REWARD, REJECTED_REWARD
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World
from fastrl.sampler import Sampler
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import order

SCORES = [1.0, 0.0, 0.5, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]  # the second prompt is not solved
ANSWERS = [[11, 12], [13, 14, 15, 1], [16, 17, 1]]


def demonstration(i: int) -> Sample:
    return Sample([*PROMPTS[i], *ANSWERS[i]], [False] * len(PROMPTS[i]) + [True] * len(ANSWERS[i]))


def joining(config: Hybrid, row: HybridAlgorithm, known: Known, world: World | None = None) -> Joining:
    """What adds members to the groups of rollouts."""
    rewards = (
        config.algorithm.number("demo_reward", DEMO_REWARD),
        config.algorithm.number("rejected_reward", REJECTED_REWARD),
    )
    return Joining(config, row, known, rewards, world or World())


def hybrid_config(**changes: Any) -> Hybrid:
    options: dict[str, Any] = {
        "model": "",
        "steps": 10,
        "prompts": len(PROMPTS),
        "group": GROUP,
        "max_new_tokens": BUDGET,
        "seed": SEED,
    }
    return for_some_row(Hybrid, **options | changes)


def mixture(
    model: Decoder,
    row: HybridAlgorithm,
    scores: Sequence[float] = SCORES,
    known: Sequence[int] = (0, 1, 2),
    world: World | None = None,
    reshape: Callable[[Shaping], Shaping] = lambda shaping: shaping,
    **changes: Any,
) -> RolloutSource:
    """Rollouts of `model` for PROMPTS, scored by `scores` whatever they are, with the demonstrations of the
    `known` prompts.

    reshape  changes the shaping of the row
    """
    config = hybrid_config(**changes)
    members = joining(
        config, row, lambda some: [(demonstration(i) if i in known else None,) for i in some], world
    )
    extra = ExtraLogProbs(reference if row.kl_coef else None, reference, row.policy.correction)
    shaping = reshape(members.shaping())
    prompts = scored_prompts(scores, config.group)
    return rollouts_of(config, Sampler(model), prompts, row.policy, extra, world, shaping)


def learner(
    model: Decoder, row: HybridAlgorithm, micro_tokens: int = 10**6, world: World | None = None
) -> Learner[Any]:
    objective = HybridObjective(PolicyObjective(model, row), row)
    return learner_of(objective, model, micro_tokens=micro_tokens, world=world)


def corrected(name: str, correction: str | None) -> HybridAlgorithm:
    """The row, with a correction by its name."""
    row = HYBRIDS[name]
    bounded = None if correction is None else CORRECTIONS[correction]
    return replace(row, policy=replace(row.policy, correction=bounded))


# --- the equations ----------------------------------------------------------------------------------
@dataclass
class Row:
    """Loss tokens of one sequence: log-probs and entropies now, recorded log-probs, and its reward (None for
    a demonstration).
    """

    logp: Tensor
    entropy: Tensor
    old: Tensor
    reward: float | None = None

    @property
    def r(self) -> Tensor:
        return (self.logp - self.old).exp()

    @property
    def p(self) -> Tensor:
        return self.logp.exp()

    @property
    def H(self) -> Tensor:
        return self.entropy.mean().detach()


@dataclass
class Group:
    """A prompt's completions, and its demonstration, if there is one."""

    own: list[Row]
    demo: Row | None

    @property
    def solved(self) -> float:
        return sum(s.reward >= 1 for s in self.own) / len(self.own)  # type: ignore[operator]

    def centred(self, union: bool = False, scale: bool = False) -> list[float]:
        """(R - mean) / std of the completions, then of the demonstration, whose reward is 1."""
        R = torch.tensor(
            [s.reward for s in self.own] + [1.0] * (union and self.demo is not None), dtype=torch.float64
        )
        A = R - R.mean()
        return (A / (R.std() + 1e-4 if scale else 1)).tolist()

    def measured_by_own(self, scale: bool = False) -> list[float]:
        """(R - mean) / std of the completions, then of the demonstration by their mean and std."""
        R = [float(s.reward) for s in self.own]  # type: ignore[arg-type]
        mean = sum(R) / len(R)
        std = math.sqrt(sum((r - mean) ** 2 for r in R) / (len(R) - 1))
        divisor = std + 1e-4 if scale and std > 0 else 1
        return [(r - mean) / divisor for r in (*R, *([1.0] if self.demo is not None else []))]


def forward(model: Decoder, tokens: Tensor, mask: Tensor, old: Tensor, reward: float | None = None) -> Row:
    """Alone, through a whole softmax."""
    every = (model(tokens) @ model.head_weight.T).double().log_softmax(-1)[:-1]
    logp, h, live = every.gather(1, tokens[1:, None]).squeeze(1), -(every.exp() * every).sum(-1), mask[1:]
    return Row(logp[live], h[live], old[1:][live].double(), reward)


def groups(
    model: Decoder, source: RolloutSource, scores: Sequence[float], known: Sequence[int]
) -> Callable[[], list[Group]]:
    """What the source draws, now; the function gives it under the model's weights as they then are."""
    rollouts = source._sample(0, 0)[0].rollouts
    columns = rollouts.tokens, rollouts.completion_mask, rollouts.logp
    spans = [slice(a, b) for a, b in pairwise(rollouts.cu_seqlens.tolist())]

    def under() -> list[Group]:
        out = []
        for g, prompt in enumerate(order(len(PROMPTS), SEED, 0, len(PROMPTS))):
            own = [
                forward(model, *(x[spans[g * GROUP + i]] for x in columns), scores[prompt * GROUP + i])
                for i in range(GROUP)
            ]
            shown = demonstration(prompt)
            tokens = torch.tensor(shown.tokens)
            demo = (
                forward(model, tokens, torch.tensor(shown.mask), torch.zeros(len(tokens)))
                if prompt in known
                else None
            )
            out.append(Group(own, demo))
        return out

    return under


def clipped(s: Row, A: float) -> Tensor:
    return torch.minimum(s.r * A, s.r.clamp(0.8, 1.2) * A)


def per_token(rows: Sequence[Tensor]) -> Tensor:
    """The mean over all tokens of all sequences; 0 without any."""
    return torch.cat(list(rows)).mean() if rows else torch.tensor(0.0, dtype=torch.float64)


def by_budget(rows: Sequence[Tensor]) -> Tensor:
    return sum((x.sum() for x in rows), torch.zeros((), dtype=torch.float64)) / (max(len(rows), 1) * BUDGET)


def by_sequence(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in rows]).mean()


def hpt(data: list[Group], gate: float = 0.0, sft_coef: float = 1.0) -> Tensor:
    rl, sft, n = [], [], len(data)
    for g in data:
        if g.demo is not None and g.solved <= gate:
            sft.append(g.demo.logp)
        else:
            rl += [s.r * A for s, A in zip(g.own, g.centred(), strict=True)]
    return (n - len(sft)) / n * by_budget(rl) + len(sft) / n * sft_coef * per_token(sft)


def hpt_soft(data: list[Group]) -> Tensor:
    rl, sft, table = [], [], {0: (0, 1), 2: (0.125, 0.5), 4: (0.5, 0.125)}
    for g in data:
        own, taught = table[round(8 * g.solved)] if g.demo is not None else (1, 0)
        rl += [own * s.r * A for s, A in zip(g.own, g.centred(), strict=True) if own]
        if g.demo is not None and taught:
            sft.append(taught * g.demo.logp)
    return len(rl) / (len(data) * GROUP) * by_budget(rl) + len(sft) / len(data) * per_token(sft)


def luffy(data: list[Group], gamma: float = 0.1, split: bool = False) -> Tensor:
    rows = []
    for g in data:
        A = g.measured_by_own() if split else g.centred(union=True)
        rows += [s.r * a for s, a in zip(g.own, A, strict=False)]
        rows += [A[-1] * g.demo.p / (g.demo.p + gamma)] if g.demo is not None else []
    return by_budget(rows)


def srft(data: list[Group]) -> Tensor:
    rows, sft = [], []
    for g in data:
        for s in g.own:
            right = s.reward > 0  # type: ignore[operator]
            rows.append((0.1 * s.H.exp() if right else 1.0) * clipped(s, 1.0 if right else -1.0))
        if g.demo is not None:
            rows.append(g.demo.p * g.centred(union=True, scale=True)[-1])
            sft.append(0.5 * (-g.demo.H).exp() * g.demo.logp)
    return by_sequence(rows) + len(sft) / len(data) * per_token(sft)


def grpo(data: list[Group]) -> Tensor:
    return by_sequence(
        [clipped(s, A) for g in data for s, A in zip(g.own, g.centred(scale=True), strict=True)]
    )


def supervised(data: list[Group], weight: Callable[[Row], Tensor | float] = lambda s: 1.0) -> Tensor:
    rows = [weight(g.demo) * g.demo.logp for g in data if g.demo is not None]
    return len(rows) / len(data) * per_token(rows)


OBJECTIVES: dict[
    str, Callable[[list[Group]], Tensor]
] = {  # what each row maximises at the first of ten steps
    "hpt": hpt,
    "hpt_soft": hpt_soft,
    "luffy": luffy,
    "srft": srft,
    "chord": lambda data: 0.1 * grpo(data) + 0.9 * supervised(data),
    "chord_phi": lambda data: 0.9 * grpo(data) + 0.1 * supervised(data, lambda s: (s.p * (1 - s.p)).detach()),
    "mixed": lambda data: grpo(data) + supervised(data),
}


def with_rule(name: str, **params: float) -> HybridAlgorithm:
    """A row whose rule has other parameters."""
    row = HYBRIDS[name]
    return replace(row, rule=replace(row.rule, params={**row.rule.params, **params}))


def half_cosine(step: int, peak: float, end: float, warmup: int, decay: int) -> float:
    """CHORD's mu."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * min(1, (step - warmup) / decay))) / 2
