"""On-policy batches: groups of completions, what each earned, and the columns that a loss needs.

`RolloutSource` is final.  What another method does differently is its `Shaping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fastrl.algorithms.correction import Correction
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch
from fastrl.config import OnPolicy
from fastrl.methods.grpo.groups import SampledGroups, has_signal, rollout_metrics
from fastrl.methods.grpo.refill import fill
from fastrl.methods.grpo.sampling import GroupSampler
from fastrl.parallel.world import World
from fastrl.train.source import Metrics, State, Step
from fastrl.train.weighting import correct, without_rejected

LogProbs = Callable[[Batch], Tensor]  # a batch -> (T,) log-probs of its loss tokens, nats


@dataclass(frozen=True, slots=True)
class Shaping:
    """How sampled groups become a batch; see shaping.py for the policy's own.

    extend   (groups, step, version) -> the groups with members that were not sampled, and metrics of them
    credit   (groups, local samples) -> which of these samples are trained on, and what each earned
    columns  (batch, groups, its samples, their credit) -> the batch with further columns, and metrics of them
    weigh    a minibatch -> the same with its tokens' weights: one optimizer step's
    prune    a minibatch -> the same without the sequences that cannot move the weights
    """

    extend: Callable[[SampledGroups, int, int], tuple[SampledGroups, Metrics]]
    credit: Callable[[SampledGroups, list[int]], tuple[list[int], Tensor]]
    columns: Callable[[Batch, SampledGroups, list[int], Tensor], tuple[Batch, Metrics]]
    weigh: Callable[[Batch], Batch]
    prune: Callable[[Batch], Batch]


@dataclass(frozen=True, slots=True)
class ExtraLogProbs:
    """Log-probs that a batch needs beside those of its sampler.

    reference   under the reference model; None where the algorithm compares with none
    trainer     under the weights before the step's first update: called once per step, only if there is a
                correction and either the step has several updates or what it rejects leaves the batch
    correction  what makes up for the sampler's distance from the trainer; None trusts the recorded log-probs
    """

    reference: LogProbs | None = None
    trainer: LogProbs | None = None
    correction: Correction | None = None


@final
class RolloutSource:
    """The on-policy source: `collect` samples `config.group` completions of every prompt, scores them, and
    returns a batch for each optimizer step.
    """

    def __init__(
        self, config: OnPolicy, groups: GroupSampler, extra: ExtraLogProbs, shaping: Shaping, world: World
    ) -> None:
        drops = extra.correction is not None and extra.correction.drops
        early = drops or config.minibatches * config.epochs > 1
        if extra.correction is not None and extra.trainer is None and early:
            raise ValueError(
                "trainer: expected a function of the batch, got None; "
                "a correction over several updates, or one that drops tokens, needs it"
            )
        self.config, self.groups, self.shaping, self.world = config, groups, shaping, world
        # With one update per step its own forward pass is the trainer's: `Algorithm.corrected` computes the
        # correction there.
        self.extra = extra if early else replace(extra, correction=None)

    def collect(self, step: int, version: int) -> Step[Batch]:
        """Sample, score and shape the groups of `step`; a batch for each of its optimizer steps."""
        config = self.config
        sampled, kept = self._sample(step, version)
        groups, extended = self.shaping.extend(sampled, step, version)

        # This process's groups of the batch, by their place in it.
        local = {place: i for i, place in enumerate(groups.places) if place in kept}
        samples = [i * groups.size + g for i in local.values() for g in range(groups.size)]
        batch, shaped = self._batch(groups, samples)

        metrics = rollout_metrics(sampled, config.group, version, self.world) | extended
        if config.refill:
            metrics |= {"refill/groups": float(sampled.total), "refill/kept": float(len(kept))}
        places = [kept.index(place) for place in local]
        batches = list(self._minibatches(batch, places))
        return Step(batches, metrics | shaped, sampled.samples(config.group))

    def state(self) -> State:
        """The groups that wait for the next step."""
        return self.groups.state()

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        self.groups.load_state(state)

    def _sample(self, step: int, version: int) -> tuple[SampledGroups, list[int]]:
        """All that was sampled for the step, and the places of the groups that make its batch."""
        config = self.config
        if not config.refill:
            groups = self.groups.sample_round(step, 0, config.prompts, version)
            return groups, list(range(groups.total))

        def sample(index: int, count: int, before: int) -> SampledGroups:
            return self.groups.sample_round(step, index, count, version, before)

        rounds, kept = fill(sample, self._useful, prompts=config.prompts, rounds=config.refill)
        return SampledGroups.join(rounds), kept

    def _useful(self, groups: SampledGroups) -> list[bool]:
        """Which groups of the round, of all processes, have rewards that differ."""
        return self.world.gather(has_signal(groups.reward, self.config.group).tolist())

    def _batch(self, groups: SampledGroups, samples: list[int]) -> tuple[Batch, Metrics]:
        """The local samples with their credit and every other column."""
        rejected: Metrics = {}
        samples, credit = self.shaping.credit(groups, samples)
        batch = self._pack(groups, samples)

        batch = replace(batch, advantage=batch.per_token(credit)).with_known()
        if self.extra.correction is not None:
            assert self.extra.trainer is not None
            batch = correct(batch, self.extra.correction, self.extra.trainer(batch))
            if self.extra.correction.drops:
                batch, rejected["sampler/rejected"] = without_rejected(batch, self.world)
        if self.extra.reference is not None:
            batch = replace(batch, ref_logp=self.extra.reference(batch))
        batch, metrics = self.shaping.columns(batch, groups, samples, credit)
        return batch, metrics | rejected

    def _pack(self, groups: SampledGroups, samples: list[int]) -> Batch:
        """The samples, in the order given; the log-prob recorded while sampling is the old one."""
        rollouts = groups.rollouts
        mask = rollouts.completion_mask
        if self.config.overlong_filter:
            stayed = torch.tensor([reason != "length" for reason in rollouts.finish_reason])
            (ended,) = send([stayed], mask.device)
            lengths = rollouts.cu_seqlens.diff().long()
            mask = mask & torch.repeat_interleave(ended, lengths, output_size=mask.numel())

        zeros = torch.zeros_like(rollouts.logp)
        batch = Batch(
            tokens=rollouts.tokens,
            cu_seqlens=rollouts.cu_seqlens,
            mask=mask,
            advantage=zeros,
            old_logp=rollouts.logp,
            weight=zeros,
        )
        # Compare the indices: `samples` may be reordered, or others of the same number.
        return batch if samples == list(range(len(rollouts))) else batch.select(samples)

    def _minibatches(self, batch: Batch, places: Sequence[int]) -> Iterator[Batch]:
        """Epochs of minibatches of whole groups, each weighed as one optimizer step and pruned.

        places  each local group's place among the kept groups of the step

        Minibatch k takes the groups with place % config.minibatches == k, so it holds the same groups for any
        number of processes.  The prompts are shuffled already.
        """
        batch, count = batch.with_known(), self.config.minibatches
        size = len(batch) // max(len(places), 1)
        for _ in range(self.config.epochs):
            for k in range(count):
                groups = [i for i, place in enumerate(places) if place % count == k]
                samples = [group * size + i for group in groups for i in range(size)]
                part = batch.select(samples) if count > 1 else batch
                yield self.shaping.prune(self.shaping.weigh(part))
