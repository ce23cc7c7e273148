"""The fusions restated: whole sequences in float64, padded sides of pairs, sums and comparisons written out;
and small sources to try.

What a policy's own completions maximise is hybrids.py's, what a pair costs is preferences.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hybrids import (
    ANSWERS,
    Group,
    Row,
    by_budget,
    by_sequence,
    clipped,
    forward,
    hybrid_config,
    joining,
)
from preferences import Side
from runs import PROMPTS, SEED, reference, rollouts_of, scored_prompts
from torch import Tensor

from fastrl.algorithms.group_preference import GroupPreference
from fastrl.algorithms.hybrid import HybridAlgorithm
from fastrl.batch.types import Batch
from fastrl.config import Hybrid
from fastrl.data.encode import Sample
from fastrl.data.pairs import LabelledSample, Unit
from fastrl.methods.dpo.batches import Preferences
from fastrl.methods.grpo.rollouts import ExtraLogProbs, RolloutSource, Shaping
from fastrl.methods.hybrid.contrast import Contrast
from fastrl.methods.hybrid.pairs import PolicyAndPairs
from fastrl.model.decoder import Decoder
from fastrl.parallel.world import World
from fastrl.sampler import Sampler
from fastrl.train.source import order

NAN = float("nan")
# ties, a group of equals, a completion without a reward
SCORES = [
    1.0,
    0.0,
    0.5,
    0.0,
    0.25,
    0.25,
    0.25,
    0.25,
    0.0,
    NAN,
    1.0,
    0.75,
]
WRONG = [[21], [1], [22, 23, 24, 25, 1]]  # completions of one token, too
PAIRS = len(PROMPTS)
COUNT = 2  # offline pairs of an optimizer step
CPU = torch.device("cpu")


def sample(i: int, completion: list[int]) -> Sample:
    return Sample([*PROMPTS[i], *completion], [False] * len(PROMPTS[i]) + [True] * len(completion))


def pair(i: int) -> Unit:
    return LabelledSample(sample(i, ANSWERS[i]), True), LabelledSample(sample(i, WRONG[i]), False)


def anchor(batch: Batch) -> Tensor:
    """Some log-probs of a reference for offline pairs, a function of token and place."""
    place = torch.arange(len(batch.tokens)) - batch.cu_seqlens[:-1].long().repeat_interleave(
        batch.cu_seqlens.diff().long()
    )
    return torch.where(batch.mask, -1.5 - 0.1 * (batch.tokens % 7) - 0.05 * place, 0.0)


# --- sources ----------------------------------------------------------------------------------------
def sampled(
    model: Decoder,
    row: Any,
    scores: Sequence[float],
    config: Hybrid,
    shaping: Shaping | None = None,
) -> RolloutSource:
    """Rollouts of `model` for PROMPTS, scored by `scores` whatever they are."""
    compared = row.kl_coef or getattr(row, "anchor", "old") == "start"
    policy = getattr(row, "policy", row)
    extra = ExtraLogProbs(reference if compared else None, reference, policy.correction)
    prompts = scored_prompts(scores, config.group)
    return rollouts_of(config, Sampler(model), prompts, policy, extra, shaping=shaping)


def on_policy(model: Decoder, row: Any, scores: Sequence[float], **changes: Any) -> RolloutSource:
    """Rollouts with the policy's own shaping."""
    return sampled(model, row, scores, hybrid_config(**changes))


def fused(
    model: Decoder, row: HybridAlgorithm, scores: Sequence[float] = SCORES, **changes: Any
) -> PolicyAndPairs:
    """Rollouts, and COUNT offline pairs for each of their batches."""
    config = hybrid_config(**changes)
    alone = joining(config, row, lambda some: [()] * len(some))
    rollouts = sampled(model, row, scores, config, alone.shaping())
    assert row.pairs is not None
    return PolicyAndPairs(config, rollouts, offline(row), row.pairs)


def offline(row: HybridAlgorithm) -> Preferences:
    known = (lambda indices, batch: anchor(batch)) if row.pairs.preference.reference else None
    return Preferences(
        lambda some: [pair(i) for i in some],
        PAIRS,
        row.pairs.preference,
        count=COUNT,
        seed=SEED,
        device=CPU,
        world=World(),
        reference=known,
    )


def members(
    model: Decoder,
    row: HybridAlgorithm,
    scores: Sequence[float] = SCORES,
    known: Sequence[int] = (0, 2),
    **changes: Any,
) -> RolloutSource:
    """Rollouts with the pairs of the `known` prompts among them; the second prompt, where it has one, lacks
    the rejected side.
    """

    def sides(i: int) -> tuple[Sample | None, ...]:
        return (
            (sample(i, ANSWERS[i]), None if i == 1 else sample(i, WRONG[i])) if i in known else (None, None)
        )

    config = hybrid_config(**changes)
    joined = joining(config, row, lambda some: [sides(i) for i in some])
    return sampled(model, row, scores, config, joined.shaping())


def contrasted(
    model: Decoder, row: GroupPreference, scores: Sequence[float] = SCORES, **changes: Any
) -> RolloutSource:
    config = hybrid_config(**changes)
    return sampled(model, row, scores, config, Contrast(config, row, World()).shaping())


# --- what they draw ---------------------------------------------------------------------------------
def groups(model: Decoder, source: Any, scores: Sequence[float], step: int = 0) -> Callable[[], list[Group]]:
    """What the source draws at `step`, by prompt; the function gives it under the model's weights as they
    then are.
    """
    rollouts, G = source._sample(step, 0)[0].rollouts, source.config.group
    columns = rollouts.tokens, rollouts.completion_mask, rollouts.logp
    spans = [slice(a, b) for a, b in pairwise(rollouts.cu_seqlens.tolist())]

    def under() -> list[Group]:
        prompts = order(len(PROMPTS), SEED, step * source.config.prompts, source.config.prompts)
        rows = [
            [forward(model, *(x[spans[g * G + i]] for x in columns), scores[p * G + i]) for i in range(G)]
            for g, p in enumerate(prompts)
        ]
        return [Group(own, None) for own in rows]

    return under


def alone(model: Decoder, shown: Sample) -> Row:
    tokens = torch.tensor(shown.tokens)
    return forward(model, tokens, torch.tensor(shown.mask), torch.zeros(len(tokens)))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(map(len, rows))) < torch.tensor([len(x) for x in rows])[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-7.0), mask


def side(rows: Sequence[Tensor], refs: Sequence[Tensor]) -> Side:
    logp, mask = padded(rows)
    return Side(logp, padded(refs)[0], mask)


def offline_sides(model: Decoder, number: int) -> tuple[Side, Side]:
    """Both sides of the pairs of optimizer step `number`."""
    chosen = order(PAIRS, SEED, number * COUNT, COUNT)
    out = []
    for completions in (ANSWERS, WRONG):
        refs = [
            torch.tensor(
                [-1.5 - 0.1 * (t % 7) - 0.05 * (len(PROMPTS[i]) + k) for k, t in enumerate(completions[i])],
                dtype=torch.float64,
            )
            for i in chosen
        ]
        out.append(side([alone(model, sample(i, completions[i])).logp for i in chosen], refs))
    return out[0], out[1]


# --- the equations ----------------------------------------------------------------------------------
def zscores(rewards: Sequence[float], scale: bool) -> list[float]:
    """(R - mean) / (std + 1e-4) of those that have a reward, 0 for the others and where all are equal."""
    known = torch.tensor([r for r in rewards if r == r], dtype=torch.float64)
    if not len(known) or known.max() == known.min():
        return [0.0] * len(rewards)
    width = float(known.std()) + 1e-4 if scale else 1.0
    return [(r - float(known.mean())) / width if r == r else 0.0 for r in rewards]


def grpo(data: list[Group]) -> Tensor:
    """What is maximised: the mean over all completions of the clipped surrogate's mean."""
    return by_sequence(
        [
            clipped(s, A)
            for g in data
            for s, A in zip(g.own, zscores([s.reward for s in g.own], True), strict=True)
        ]
    )


def with_members(data: list[Group], shown: list[list[tuple[Row, float]]], name: str) -> Tensor:
    """The union of completions and members, `shown` with their rewards by group."""
    rows = []
    for g, extra in zip(data, shown, strict=True):
        A = zscores([s.reward for s in g.own] + [reward for _, reward in extra], name == "grpo_pairs")
        own = clipped if name == "grpo_pairs" else lambda s, a: s.r * a
        rows += [own(s, a) for s, a in zip(g.own, A, strict=False)]
        f = (lambda p: p) if name == "grpo_pairs" else (lambda p: p / (p + 0.1))
        rows += [a * f(row.p) for (row, _), a in zip(extra, A[len(g.own) :], strict=True)]
    return by_sequence(rows) if name == "grpo_pairs" else by_budget(rows)


def compared(g: Group, start: bool) -> list[tuple[float, Tensor, Tensor, int]]:
    """(reward, summed log-ratio, log-prob, tokens) of the completions that have a reward; the reference of
    `runs`, or the old policy.
    """
    known = [s for s in g.own if s.reward == s.reward]
    return [  # type: ignore[misc]
        (s.reward, (s.logp - (0.9 * s.old - 0.1 if start else s.old)).sum(), s.logp.sum(), len(s.old))
        for s in known
    ]


def ordered(g: Group, start: bool, pairing: str, gap: float) -> list[tuple[Any, Any]]:
    """The pairs (better, worse) that a group's rewards make."""
    there = compared(g, start)
    if pairing == "extremes":
        rewards = [x[0] for x in there]
        best, worst = there[rewards.index(max(rewards))], there[rewards.index(min(rewards))]
        return [(best, worst)] if best[0] > worst[0] and best[0] - worst[0] >= gap else []
    return [(a, b) for a in there for b in there if a[0] > b[0] and a[0] - b[0] >= gap]


def listwise(data: list[Group], start: bool, beta: float, tau: float, average: bool) -> Tensor:
    """-sum_i w_i log p_i, a mean over the groups with two rewards or more."""
    losses = []
    for g in data:
        there = compared(g, start)
        if len(there) < 2:
            continue
        e = torch.stack([beta * (rho / n if average else rho) for _, rho, _, n in there])
        r = torch.tensor([x[0] for x in there], dtype=torch.float64) / tau
        w = r.exp() / r.exp().sum()
        losses.append(-(w * (e - e.exp().sum().log())).sum())
    return torch.stack(losses).mean()
