"""Batches of completions and demonstrations together, and the learner that takes them: what `fastrl hybrid`
trains on.

What is known of a prompt follows its completions: its demonstration as one more member of the group, as a
supervised sequence, or as both; or a chosen and a rejected completion as two more members.  All that OnPolicy
does (sampling, rewards, several updates, processes) is done by it, for groups that are so many sequences
longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms import Totals
from fastrl.algorithms.aggregate import token_mean
from fastrl.algorithms.hybrid import MEMBER, OWN, SUPERVISED, HybridAlgorithm
from fastrl.batch.types import Batch, Rollouts, Tokens
from fastrl.config import Hybrid
from fastrl.data.rows import Sample
from fastrl.methods.grpo.draw import Draw
from fastrl.methods.grpo.rollouts import OnPolicy
from fastrl.methods.hybrid.options import DEMO_REWARD, REJECTED_REWARD, SOLVED, check_mixture
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored
from fastrl.train.learner import Learner

# prompts' numbers -> the completions known of each, None for none
Known = Callable[[Sequence[int]], Sequence[Sequence[Sample | None]]]


# --- the source -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Completed(Draw):
    """A draw with its demonstrations.

    kind      (S,) int64, of KINDS
    counts    (S,) fp32, how much the sequence counts
    rewarded  the draw without the supervised sequences, which have no reward
    """

    kind: Tensor
    counts: Tensor
    rewarded: Draw


class Mixture(OnPolicy):
    """Rollouts with known(numbers) -> the completions known of the prompts of these numbers: `sides` of each,
    None where there is none.

    Raises UserError for settings that have no meaning with demonstrations in the batch.
    """

    config: Hybrid

    def __init__(
        self,
        config: Hybrid,
        sampler: Any,
        algorithm: HybridAlgorithm,
        *,
        known: Known,
        **others: Any,
    ) -> None:
        check_mixture(config, algorithm, turns=others.get("game") is not None)
        super().__init__(config, sampler, algorithm.policy, **others)
        self.row = algorithm
        self.known = known
        self.rewards = (
            config.algorithm.number("demo_reward", DEMO_REWARD),
            config.algorithm.number("rejected_reward", REJECTED_REWARD),
        )
        self.solved = config.algorithm.number("solved", SOLVED)
        self.members += len(algorithm.others)

    def _complete(self, draw: Draw, step: int, version: int) -> tuple[Draw, dict[str, float]]:
        G, P, device = self.config.group, len(draw.numbers), draw.rollouts.tokens.device
        found = self.known(draw.numbers)
        there = torch.tensor([any(samples) for samples in found], dtype=torch.bool, device=device)
        reward = draw.reward.view(P, G)
        # NaN where nothing is known
        solved = (reward >= self.solved).sum(1) / (~reward.isnan()).sum(1)
        count = self.row.rule(solved, there, step, self.config.steps)
        kinds = [OWN] * G + self.row.others
        rewarded = draw
        for side in range(self.row.others.count(MEMBER)):
            samples, counted = [known[side] for known in found], (count[:, MEMBER] > 0).tolist()
            told = [
                self.rewards[side] if sample and on else math.nan
                for sample, on in zip(samples, counted, strict=True)
            ]
            rewarded = _longer(rewarded, samples, told, version)
        supervised = self.row.supervised is not None
        whole = (
            _longer(rewarded, [known[0] for known in found], [math.nan] * P, version)
            if supervised
            else rewarded
        )
        kind = torch.tensor(kinds, device=device).repeat(P)
        completed = Completed(
            whole.items,
            whole.rollouts,
            whole.scored,
            whole.places,
            whole.prompts,
            whole.numbers,
            kind,
            count[:, kinds].flatten(),
            rewarded,
        )
        return completed, _told(solved, there, count, self.world) if self.row.others else {}

    def _advantage(self, draw: Draw, own: list[int]) -> Tensor:
        """Those of the completions, and of the demonstrations among them; 1 for what is supervised."""
        assert isinstance(draw, Completed)
        group = self.members
        with_reward = group - (self.row.supervised is not None)
        rows = [i // group * with_reward + i % group for i in own if i % group < with_reward]
        kind = draw.kind[own]
        advantage = super()._advantage(draw.rewarded, rows)
        out = torch.ones(len(own), dtype=advantage.dtype, device=advantage.device)
        out[kind != SUPERVISED] = advantage
        if self.row.own_advantage is not None:
            reward = draw.reward[own][kind == OWN]
            out[kind == OWN] = self.row.own_advantage(reward, self.config.group)
        return out

    def _batch(self, draw: Draw, own: list[int], advantage: Tensor) -> Batch:
        assert isinstance(draw, Completed)
        batch = super()._batch(draw, own, advantage)
        lengths = batch.cu_seqlens.diff().long()
        kind, counts = (torch.repeat_interleave(x[own], lengths) for x in (draw.kind, draw.counts))
        return replace(batch, kind=kind, weight=counts, mask=batch.mask & (counts != 0))

    def _weigh(self, part: Batch) -> Batch:
        return weigh_apart(
            part, self.row, self.world, group=self.config.group, max_length=self.config.max_new_tokens
        )

    def _live(self, batch: Batch) -> Batch:
        """Without the sequences that do not count, or cannot move anything; their denominators stay."""
        policy, first = self.algorithm, batch.cu_seqlens[:-1].long()
        moves = batch.advantage[first] != 0
        if policy.kl_coef or policy.entropy_coef:
            assert batch.kind is not None
            moves = moves | (batch.kind[first] == OWN)
        moves = moves & (batch.live_ends.diff() > 0)
        return batch if bool(moves.all()) else batch.select(moves.nonzero().squeeze(1).tolist())


def weigh_apart(
    batch: Batch, algorithm: HybridAlgorithm, world: World, *, group: int, max_length: int
) -> Batch:
    """The batch with its tokens' weights, of which it brings what multiplies them; `group` completions of
    every prompt are in it.

    Completions and the demonstrations among them are aggregated as the algorithm says, supervised tokens by
    their mean, and neither counts in the other's denominators; each term is then weighed by its share of the
    prompts, so that the loss is a mean over prompts, whichever way each is taught.  Counts are of the whole
    optimizer step, all processes included.
    """
    assert batch.kind is not None
    live, first = batch.live_ends.diff(), batch.cu_seqlens[:-1].long()
    kind, counts = batch.kind[first], batch.weight[first] != 0
    taught = kind == SUPERVISED
    sums = [
        live * ~taught,
        (live > 0) & ~taught,
        live * taught,
        (live > 0) & taught,
        kind == OWN,
        counts & (kind == OWN),
        counts & taught,
    ]
    tokens, samples, sft_tokens, sft_samples, own, open_, shut = world.sum(*(float(x.sum()) for x in sums))
    length, prompts = live.to(torch.float32), max(own / group, 1)
    rl = algorithm.policy.aggregate(
        length, Totals(tokens=int(tokens), samples=int(samples), max_length=max_length)
    ) * (open_ / group / prompts)
    sft = token_mean(
        length, Totals(tokens=int(sft_tokens), samples=int(sft_samples), max_length=max_length)
    ) * (shut / prompts)
    per_sample = torch.where(taught, sft, rl)
    return replace(
        batch, weight=batch.weight * torch.repeat_interleave(per_sample, batch.cu_seqlens.diff().long())
    )


def _longer(draw: Draw, samples: Sequence[Sample | None], reward: Sequence[float], version: int) -> Draw:
    """The draw with one more sequence at the end of each group; where there is none, one token that does not
    count.
    """
    r, P = draw.rollouts, len(samples)
    n, ends = len(r) // max(P, 1), r.cu_seqlens.tolist()
    rows = [s or Sample([int(r.tokens[ends[g * n]])], [False]) for g, s in enumerate(samples)]

    def column(values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=r.tokens.device)

    mask = column([m for row in rows for m in row.mask], torch.bool)
    zeros = torch.zeros(mask.shape, dtype=r.logp.dtype, device=mask.device)
    more = Rollouts(
        tokens=column([t for row in rows for t in row.tokens]),
        completion_mask=mask,
        prompt_index=column(list(range(P))),
        cu_seqlens=column([0, *accumulate(len(row.tokens) for row in rows)], torch.int32),
        prompt_lengths=column([row.mask.count(False) for row in rows]),
        logp=zeros,
        behaviour_logp=zeros,
        entropy=zeros,
        weight_version=torch.where(mask, version, -1),
        finish_reason=["stop"] * P,
        sequence=None if r.sequence is None else column([0] * P),
    )
    order = [i for g in range(P) for i in (*range(g * n, g * n + n), len(r) + g)]
    both = [*draw.scored.reward, *reward]
    return Draw(
        draw.items,
        Rollouts.join([r, more]).select(order),
        Scored([both[i] for i in order]),
        draw.places,
        draw.prompts,
        draw.numbers,
    )


def _told(solved: Tensor, there: Tensor, count: Tensor, world: World) -> dict[str, float]:
    """What is reported of the step's prompts, of all processes."""
    known = ~solved.isnan()
    sums = (there, solved.nan_to_num(0), known, count[:, SUPERVISED] > 0, count[:, OWN] > 0, *count.unbind(1))
    P, demonstrated, right, knows, *shares = world.sum(float(len(solved)), *(float(x.sum()) for x in sums))
    names = ("sft_prompts", "rl_prompts", "own_coef", "member_coef", "sft_coef")
    told = {f"hybrid/{name}": x / max(P, 1) for name, x in zip(names, shares, strict=True)}
    return told | {
        "hybrid/demonstrated": demonstrated / max(P, 1),
        "hybrid/solved": right / knows if knows else math.nan,
    }


# --- the learner ------------------------------------------------------------------------------------
class MixedLearner(Learner):
    """The learner whose metrics tell the policy's own tokens from those of demonstrations."""

    algorithm: HybridAlgorithm

    def _measure(self, loss: Tensor, seen: Tokens) -> Tensor:
        assert seen.kind is not None
        nll, one = -seen.logp.double(), torch.ones_like(seen.logp, dtype=torch.float64)
        sums = [
            torch.where(seen.kind == kind, x, 0).sum() for kind in (MEMBER, SUPERVISED) for x in (one, nll)
        ]
        return torch.cat([super()._measure(loss, only(seen, OWN)), torch.stack(sums)])

    def _merged(self, rows: list[list[float]]) -> dict[str, float]:
        """The loss is of all tokens; ratios, clip fractions and the like are of the policy's own, and absent
        where it has none.
        """
        merged = super()._merged([row[:-4] for row in rows])
        members, member_nll, taught, nll = (math.fsum(row[i] for row in rows) for i in range(-4, 0))
        merged["num_tokens"] += members + taught
        told = bool(self.algorithm.others) and merged["num_tokens"] > 0
        merged |= {"off_policy_share": (members + taught) / merged["num_tokens"]} if told else {}
        return (
            merged
            | ({"sft_loss": nll / taught} if taught else {})
            | ({"member_nll": member_nll / members} if members else {})
        )


def only(tokens: Tokens, kind: int) -> Tokens:
    """The tokens of one kind; their sequences keep their places, with no token where they are of another."""
    assert tokens.kind is not None
    mine = tokens.kind == kind
    before = torch.cat([mine.new_zeros(1, dtype=torch.int64), mine.cumsum(0)])
    ends = None if tokens.cu_seqlens is None else before[tokens.cu_seqlens.long()].to(torch.int32)
    rows = mine.nonzero().squeeze(1)
    entropy = None if tokens.entropy is None else tokens.entropy[rows]
    return replace(tokens[rows].with_(tokens.logp[rows], entropy), cu_seqlens=ends)
