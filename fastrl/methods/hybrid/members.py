"""Members that were not sampled: demonstrations and pairs in the groups of a policy's completions.

What is known of a prompt follows its completions: its demonstration as one more member of the group, as a
supervised sequence, or as both; or a chosen and a rejected completion as two more members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fastrl.algorithms import Totals
from fastrl.algorithms.aggregate import token_mean
from fastrl.algorithms.hybrid import MEMBER, OWN, SUPERVISED, HybridAlgorithm
from fastrl.batch.types import Batch, Rollouts
from fastrl.config import Hybrid
from fastrl.data.encode import Sample
from fastrl.methods.grpo.groups import Members, SampledGroups
from fastrl.methods.grpo.rollouts import Shaping
from fastrl.methods.grpo.shaping import group_advantages, keep, policy_shaping
from fastrl.methods.hybrid.options import SOLVED
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored
from fastrl.train.source import Metrics

# prompts' numbers -> the completions known of each; None for one that is not there
Known = Callable[[Sequence[int]], Sequence[Sequence[Sample | None]]]


@dataclass(frozen=True, slots=True)
class Joining:
    """Adds to each group what is known of its prompt, and gives each kind of sequence its credit and weight.

    rewards  of the first and the second member that joins a group
    """

    config: Hybrid
    algorithm: HybridAlgorithm
    known: Known
    rewards: tuple[float, float]
    world: World

    def shaping(self) -> Shaping:
        """The policy's shaping, for groups that are so many sequences longer."""
        base = policy_shaping(self.config, self.algorithm.policy, self.world)
        return replace(
            base,
            extend=self.extend,
            credit=self.credit,
            columns=self.columns,
            weigh=self.weigh,
            prune=self.prune,
        )

    def extend(self, groups: SampledGroups, step: int, version: int) -> tuple[SampledGroups, Metrics]:
        """The groups with their members and supervised sequences, and how the step's prompts are taught."""
        config, algorithm = self.config, self.algorithm
        size, prompts, device = config.group, len(groups.numbers), groups.rollouts.tokens.device
        known = self.known(groups.numbers)
        present = torch.tensor([any(samples) for samples in known], dtype=torch.bool, device=device)

        reward = groups.reward.view(prompts, size)
        threshold = config.algorithm.number("solved", SOLVED)
        # NaN where no completion was scored
        solved = (reward >= threshold).sum(1) / (~reward.isnan()).sum(1)
        coef = algorithm.rule(solved, present, step, config.steps)

        rewarded = groups
        counted = (coef[:, MEMBER] > 0).tolist()
        for side in range(algorithm.others.count(MEMBER)):
            samples = [sides[side] for sides in known]
            rewards = [
                self.rewards[side] if sample and on else math.nan
                for sample, on in zip(samples, counted, strict=True)
            ]
            rewarded = append_member(rewarded, samples, rewards, version)

        whole = rewarded
        if algorithm.supervised is not None:
            demonstrations = [sides[0] for sides in known]
            whole = append_member(rewarded, demonstrations, [math.nan] * prompts, version)

        kinds = [OWN] * size + algorithm.others
        kind = torch.tensor(kinds, device=device).repeat(prompts)
        members = Members(kind, coef[:, kinds].flatten(), rewarded)
        metrics = hybrid_metrics(solved, present, coef, self.world) if algorithm.others else {}
        return replace(whole, members=members), metrics

    def credit(self, groups: SampledGroups, samples: list[int]) -> tuple[list[int], Tensor]:
        """Advantages of the completions and of the demonstrations among them; 1 for what is supervised."""
        config, algorithm, members = self.config, self.algorithm, _members(groups)
        size = groups.size
        with_reward = size - (algorithm.supervised is not None)
        rows = [i // size * with_reward + i % size for i in samples if i % size < with_reward]
        advantage = group_advantages(members.rewarded, rows, config, algorithm.policy, self.world)

        kind = members.kind[samples]
        out = torch.ones(len(samples), dtype=advantage.dtype, device=advantage.device)
        out[kind != SUPERVISED] = advantage
        if algorithm.own_advantage is not None:
            reward = groups.reward[samples][kind == OWN]
            out[kind == OWN] = algorithm.own_advantage(reward, config.group)
        return samples, out

    def columns(
        self, batch: Batch, groups: SampledGroups, samples: list[int], credit: Tensor
    ) -> tuple[Batch, Metrics]:
        """The batch with each token's kind, and its sequence's coefficient as its weight."""
        members = _members(groups)
        kind, coef = (batch.per_token(x[samples]) for x in (members.kind, members.coef))
        return replace(batch, kind=kind, weight=coef, mask=batch.mask & (coef != 0)), {}

    def weigh(self, part: Batch) -> Batch:
        """The minibatch with its tokens' weights; see `weigh_apart`."""
        config = self.config
        return weigh_apart(
            part, self.algorithm, self.world, group=config.group, max_length=config.max_new_tokens
        )

    def prune(self, batch: Batch) -> Batch:
        """Without the sequences that do not count, or cannot move anything; their denominators stay."""
        policy, host = self.algorithm.policy, batch.host
        first = host.cu_seqlens[:-1].long()
        moves = host.advantage[first] != 0
        if policy.kl_coef or policy.entropy_coef:
            assert host.kind is not None
            moves = moves | (host.kind[first] == OWN)
        return keep(batch, moves & (host.live_ends.diff() > 0))


def _members(groups: SampledGroups) -> Members:
    if groups.members is None:
        raise ValueError("groups: expected groups with members, got groups as they were sampled")
    return groups.members


def weigh_apart(
    batch: Batch, algorithm: HybridAlgorithm, world: World, *, group: int, max_length: int
) -> Batch:
    """Turn per-token multipliers, which the batch brings as its weights, into loss weights.

    Policy and supervised tokens are normalised separately: completions and the demonstrations among them are
    aggregated as the algorithm says, supervised tokens by their mean, and neither counts in the other's
    denominators.  Each term is then weighed by its share of the prompts, so that the loss is a mean over
    prompts, whichever way each is taught.  Counts are of the whole optimizer step, all processes included;
    `group` completions of every prompt are in it.
    """
    assert batch.kind is not None
    live, first = batch.live_ends.diff(), batch.cu_seqlens[:-1].long()
    kind, trained = batch.kind[first], batch.weight[first] != 0
    taught = kind == SUPERVISED

    sampled = kind == OWN
    columns = (
        live * ~taught,
        (live > 0) & ~taught,
        live * taught,
        (live > 0) & taught,
        sampled,
        trained & sampled,
        trained & taught,
    )
    sums = world.sum(*(float(column.sum()) for column in columns))
    tokens, samples, sft_tokens, sft_samples, own, open_, shut = sums

    length, prompts = live.to(torch.float32), max(own / group, 1)
    rl_totals = Totals(tokens=int(tokens), samples=int(samples), max_length=max_length)
    sft_totals = Totals(tokens=int(sft_tokens), samples=int(sft_samples), max_length=max_length)

    rl = algorithm.policy.aggregate(length, rl_totals) * (open_ / group / prompts)
    sft = token_mean(length, sft_totals) * (shut / prompts)
    per_sample = torch.where(taught, sft, rl)
    return replace(batch, weight=batch.weight * batch.per_token(per_sample))


def append_member(
    groups: SampledGroups, samples: Sequence[Sample | None], reward: Sequence[float], version: int
) -> SampledGroups:
    """The groups with one more sequence at the end of each; where there is none, one token that does not
    count.
    """
    rollouts, prompts = groups.rollouts, len(samples)
    size, ends = groups.size, rollouts.cu_seqlens.tolist()
    rows = [
        sample or Sample([int(rollouts.tokens[ends[g * size]])], [False]) for g, sample in enumerate(samples)
    ]
    more = _as_rollouts(rows, rollouts, version)

    order: list[int] = []
    for g in range(prompts):
        order += [*range(g * size, g * size + size), len(rollouts) + g]
    rewards = [*groups.scored.reward, *reward]
    return replace(
        groups,
        rollouts=Rollouts.join([rollouts, more]).select(order),
        scored=Scored([rewards[i] for i in order]),
    )


def _as_rollouts(rows: Sequence[Sample], like: Rollouts, version: int) -> Rollouts:
    """Samples as if they had been sampled: log-probs are 0, because what wrote them is unknown."""
    device = like.tokens.device

    def column(values: Sequence[int | bool], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    tokens = column([t for row in rows for t in row.tokens])
    mask = column([m for row in rows for m in row.mask], torch.bool)
    ends = column([0, *accumulate(len(row.tokens) for row in rows)], torch.int32)
    prompts = column([row.mask.count(False) for row in rows])

    zeros = torch.zeros(mask.shape, dtype=like.logp.dtype, device=device)
    number = torch.arange(len(rows), device=device)
    versions = torch.where(mask, version, -1)
    whole = None if like.sequence is None else torch.zeros_like(number)
    return Rollouts(
        tokens=tokens,
        cu_seqlens=ends,
        completion_mask=mask,
        prompt_index=number,
        prompt_lengths=prompts,
        logp=zeros,
        behaviour_logp=zeros,
        entropy=zeros,
        weight_version=versions,
        finish_reason=["stop"] * len(rows),
        sequence=whole,
    )


def hybrid_metrics(solved: Tensor, present: Tensor, coef: Tensor, world: World) -> Metrics:
    """How the step's prompts are taught, over all processes.

    solved   (P,) share of a prompt's completions that solve it, NaN where none was scored
    present  (P,) whether anything is known of the prompt
    coef     (P, 3) the coefficient of each of KINDS
    """
    known = ~solved.isnan()
    taught, own = coef[:, SUPERVISED] > 0, coef[:, OWN] > 0
    sums = (present, solved.nan_to_num(0), known, taught, own, *coef.unbind(1))
    prompts, demonstrated, right, scored, *shares = world.sum(
        float(len(solved)), *(float(x.sum()) for x in sums)
    )

    names = ("sft_prompts", "rl_prompts", "own_coef", "member_coef", "sft_coef")
    metrics = {f"hybrid/{name}": x / max(prompts, 1) for name, x in zip(names, shares, strict=True)}
    return metrics | {
        "hybrid/demonstrated": demonstrated / max(prompts, 1),
        "hybrid/solved": right / scored if scored else math.nan,
    }
