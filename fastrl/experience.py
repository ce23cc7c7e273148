"""Where a training step's data comes from: demonstrations, or rollouts and their rewards.

A source is a pure function of the step number: prompts come from a seeded permutation, and sampling noise is keyed by the
sequence's number, so a resumed run sees what an uninterrupted one would, and R processes see what one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.algorithms import Algorithm, Totals
from fastrl.config import Grpo
from fastrl.data import Sample
from fastrl.device import memory_limited_by
from fastrl.dist import World
from fastrl.errors import UserError
from fastrl.rewards import Scored
from fastrl.sampler import Sampler, SamplingParams
from fastrl.types import Batch, Rollouts


def order(n: int, seed: int, first: int, count: int) -> list[int]:
    """Items [first, first + count) of an endless sequence of seeded permutations of range(n)."""
    items: list[int] = []
    while len(items) < count:
        epoch, start = divmod(first + len(items), n)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        items += torch.randperm(n, generator=generator)[start : start + count - len(items)].tolist()
    return items


@dataclass(frozen=True, slots=True)
class Step:
    """One training step's data: a batch per optimizer step, what is known of it already, and answers worth keeping."""

    batches: list[Batch]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Source(Protocol):
    """What the trainer asks for data."""

    def collect(self, step: int, version: int) -> Step:
        """The data of `step` (counted from 0); `version` is how many optimizer steps the weights have seen."""


class Demonstrations:
    """Supervised batches: `count` sequences a step, whose masked-in tokens count the same all over the step.

    items(indices) -> demonstrations out of `size`: a pure function of the indices.
    """

    def __init__(
        self, items: Callable[[Sequence[int]], list[Sample]], size: int, *, count: int, algorithm: Algorithm, seed: int,
        device: torch.device, world: World,
    ) -> None:  # fmt: skip
        self.items, self.size, self.count, self.seed = items, size, count, seed
        self.algorithm, self.device, self.world = algorithm, device, world

    def collect(self, step: int, version: int) -> Step:
        chosen = order(self.size, self.seed, step * self.count, self.count)
        rows = self.items([chosen[i] for i in self.world.share(self.count)])
        tokens = torch.tensor([t for row in rows for t in row.tokens], dtype=torch.int64, device=self.device)
        mask = torch.tensor([m for row in rows for m in row.mask], dtype=torch.bool, device=self.device)
        lengths = torch.tensor([0, *(len(row.tokens) for row in rows)], device=self.device)
        zeros = torch.zeros(tokens.shape, device=self.device)
        cu = lengths.cumsum(0).to(torch.int32)
        batch = Batch(tokens=tokens, cu_seqlens=cu, mask=mask, advantage=torch.ones_like(zeros), old_logp=zeros, weight=zeros)
        return Step([weigh(batch, self.algorithm, self.world, max_length=1)])


class OnPolicy:
    """Batches of rollouts: sample `group` completions of every prompt, score them, turn rewards into advantages.

    prompt(i) -> (prompt, columns) of item i of `size`;  score(prompts, completions, token lists, columns) -> Scored.
    reference(batch) -> (T,) log-probs under the reference model, or None when the algorithm wants no KL.
    """

    def __init__(
        self, config: Grpo, sampler: Sampler, algorithm: Algorithm, *, prompt: Callable[[int], tuple[Any, Mapping[str, Any]]], size: int,
        score: Callable[..., Scored], reference: Callable[[Batch], Tensor] | None, stop: Sequence[str], world: World,
    ) -> None:  # fmt: skip
        self.config, self.sampler, self.algorithm, self.world = config, sampler, algorithm, world
        self.prompt, self.size, self.score, self.reference = prompt, size, score, reference
        s = config.sampling
        self.params = SamplingParams(
            n=config.group, max_new_tokens=config.max_new_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
            min_p=s.min_p, seed=config.seed, stop=tuple(stop),
        )  # fmt: skip

    def collect(self, step: int, version: int) -> Step:
        config, G = self.config, self.config.group
        chosen = order(self.size, config.seed, step * config.prompts, config.prompts)
        mine = self.world.share(config.prompts)
        items = [self.prompt(chosen[i]) for i in mine]
        first = (step * config.prompts + mine.start) * G
        with memory_limited_by("--sampling.max-tokens-in-flight", config.sampling.max_tokens_in_flight):
            rollouts = self.sampler.generate([p for p, _ in items], self.params, sequence_offset=first, weight_version=version)
        repeated = [item for item in items for _ in range(G)]
        scored = self.score([p for p, _ in repeated], rollouts.text, rollouts.completions(), [c for _, c in repeated])
        reward = torch.tensor(scored.reward, dtype=torch.float32, device=rollouts.tokens.device)
        batch = self._batch(rollouts, self.algorithm.advantage(reward, G))  # type: ignore[misc]
        metrics = self._metrics(rollouts, reward, scored)
        return Step(list(self._split(batch, mine)), metrics, self._samples(repeated, rollouts, scored))

    def _batch(self, rollouts: Rollouts, advantage: Tensor) -> Batch:
        per_token = torch.repeat_interleave(advantage, rollouts.cu_seqlens.diff().long())
        zeros = torch.zeros_like(rollouts.logp)
        batch = Batch(
            tokens=rollouts.tokens, cu_seqlens=rollouts.cu_seqlens, mask=rollouts.completion_mask,
            advantage=per_token, old_logp=rollouts.logp, weight=zeros,
        )  # fmt: skip
        return batch if self.reference is None else replace(batch, ref_logp=self.reference(batch))

    def _split(self, batch: Batch, mine: range) -> Iterator[Batch]:
        """Epochs of minibatches of whole groups, each weighed as one optimizer step, without the samples that cannot move it.

        Minibatch k holds every M-th of the step's prompts, of which this process has `mine`: the same ones for any number of
        processes, and about as many in each.  (The prompts come shuffled.)
        """
        config, G, M = self.config, self.config.group, self.config.minibatches
        for _ in range(config.epochs):
            for k in range(M):
                groups = [i for i, prompt in enumerate(mine) if prompt % M == k]
                part = batch.select([g * G + i for g in groups for i in range(G)]) if M > 1 else batch
                yield self._live(weigh(part, self.algorithm, self.world, max_length=config.max_new_tokens))

    def _live(self, batch: Batch) -> Batch:
        """Without KL and entropy terms a sample with zero advantage has zero gradient: leave it out, its denominators stay."""
        if self.algorithm.kl_coef or self.algorithm.entropy_coef:
            return batch
        moves = batch.advantage[batch.cu_seqlens[:-1].long()] != 0
        return batch if bool(moves.all()) else batch.select(moves.nonzero().squeeze(1).tolist())

    def _metrics(self, rollouts: Rollouts, reward: Tensor, scored: Scored) -> dict[str, float]:
        """Means over all processes, under TRL's names; rewards that are not applicable (NaN) are left out of them."""
        G, length = self.config.group, rollouts.lengths.double()
        groups = reward.view(-1, G).double()
        known = ~reward.isnan()
        spread = groups.nan_to_num(-math.inf).amax(1) > groups.nan_to_num(math.inf).amin(1)
        cut = torch.tensor([r == "length" for r in rollouts.finish_reason], device=reward.device)
        sums = {
            "samples": float(len(rollouts)), "known": float(known.sum()), "groups": float(len(groups)), "tokens": float(length.sum()),
            "reward": float(reward.nan_to_num(0).sum()), "reward_std": float(_std(groups).sum()),
            "flat": float((~spread).sum()), "cut": float(cut.sum()), "entropy": float(rollouts.entropy.sum()),
        }  # fmt: skip
        parts = sorted(set(self.world.gather(list(scored.parts))))  # a process without samples has none
        for name in parts:
            there = [v for v in scored.parts.get(name, []) if not math.isnan(v)]
            sums |= {f"sum/{name}": math.fsum(there), f"count/{name}": float(len(there))}
        total = dict(zip(sums, self.world.sum(*sums.values()), strict=True))
        ends = (float(length.max()), -float(length.min())) if len(rollouts) else (-math.inf, -math.inf)
        longest, shortest = self.world.max(*ends)
        n = max(total["samples"], 1)
        return {
            "reward": _mean(total["reward"], total["known"]), "reward_std": total["reward_std"] / max(total["groups"], 1),
            "frac_reward_zero_std": total["flat"] / max(total["groups"], 1), "entropy": total["entropy"] / max(total["tokens"], 1),
            "completions/mean_length": total["tokens"] / n, "completions/max_length": longest, "completions/min_length": -shortest,
            "completions/clipped_ratio": total["cut"] / n, "rollout/tokens": total["tokens"],
        } | {k: _mean(total[f"sum/{k}"], total[f"count/{k}"]) for k in parts}  # fmt: skip

    def _samples(self, items: Sequence[tuple[Any, Mapping[str, Any]]], rollouts: Rollouts, scored: Scored) -> list[dict[str, Any]]:
        """The first group's completions, at most four."""
        text = rollouts.text or [str(t) for t in rollouts.completions()]
        told: dict[str, list[Any]] = {"completion": text, "reward": scored.reward, "message": scored.message, **scored.extra}
        few = range(min(4, self.config.group, len(items)))
        return [{"prompt": items[i][0]} | {name: values[i] for name, values in told.items() if values} for i in few]


def weigh(batch: Batch, algorithm: Algorithm, world: World, *, max_length: int) -> Batch:
    """The batch with its tokens' weights: the algorithm's aggregate over the whole optimizer step, all processes included."""
    live = torch.cat([batch.mask.new_zeros(1, dtype=torch.int64), batch.mask.long().cumsum(0)])[batch.cu_seqlens.long()].diff()
    tokens, samples = world.sum(float(live.sum()), float((live > 0).sum()))
    totals = Totals(tokens=int(tokens), samples=int(samples), max_length=max_length)
    per_sample = algorithm.aggregate(live.to(torch.float32), totals)
    return replace(batch, weight=torch.repeat_interleave(per_sample, batch.cu_seqlens.diff().long()))


def check_rollouts(config: Grpo) -> None:
    """Refuse settings under which the recorded log-prob would not be the policy's."""
    if config.sampling.temperature == 0:
        raise UserError("--sampling.temperature: expected a positive number, got 0; greedy samples have no old log-prob to train on")
    for option, value, fine, expected in (
        ("--group", config.group, config.group >= 2, "at least 2 completions of a prompt, to compare them"),
        ("--minibatches", config.minibatches, 1 <= config.minibatches <= config.prompts, f"1 to --prompts ({config.prompts})"),
        ("--epochs", config.epochs, config.epochs >= 1, "at least 1"),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value}")


def _mean(total: float, count: float) -> float:
    """NaN, which the log writes as null, where there is nothing to average: 0 would look like a result."""
    return total / count if count else math.nan


def _std(groups: Tensor) -> Tensor:
    """Standard deviation of each group's rewards that are not NaN; 0 for fewer than two of them."""
    n = (~groups.isnan()).sum(1)
    mean = groups.nansum(1) / n.clamp_min(1)
    centred = torch.where(groups.isnan(), 0, groups - mean[:, None])
    return (centred.square().sum(1) / (n - 1).clamp_min(1)).sqrt()
