"""Preference batches: pairs of completions, or labelled ones, with the reference model's log-probs.

As with every source, what a step gets is a function of the step's number alone, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.algorithms.preference import Preference
from fastrl.batch.types import Batch
from fastrl.data.encode import Sample
from fastrl.data.pairs import LabelledSample, Unit
from fastrl.errors import UserError
from fastrl.parallel.world import World
from fastrl.train.source import State, Step, order

Items = Callable[[Sequence[int]], list[Unit]]  # indices -> units: a pure function
Reference = Callable[[Sequence[int], Batch], Tensor]  # (indices, their batch) -> (T,) reference log-probs
LogProbs = Callable[[Batch], Tensor]  # a batch -> (T,) log-probs of its loss tokens


def pack_units(units: Sequence[Unit], count: int, device: torch.device) -> Batch:
    """The batch of `units`, which are `count` over all processes; no reference log-probs yet."""
    judged = [one for unit in units for one in unit]
    lengths = torch.tensor([len(one.sample.tokens) for one in judged], dtype=torch.int64)
    sign = torch.tensor([1.0 if one.good else -1.0 for one in judged], dtype=torch.float32)
    tokens = torch.tensor([t for one in judged for t in one.sample.tokens], dtype=torch.int64)
    mask = torch.tensor([m for one in judged for m in one.sample.mask], dtype=torch.bool)

    zeros = torch.zeros(tokens.shape)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    batch = Batch(
        tokens=tokens,
        cu_seqlens=ends.to(torch.int32),
        mask=mask,
        advantage=sign.repeat_interleave(lengths),
        old_logp=zeros,
        weight=torch.full_like(zeros, 1 / count),
    )
    return batch.to(device)


def mismatched(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Each prompt with the completion of the sample before it (the first with the last's), cut at `limit`
    tokens.

    A prompt is all before the first token that counts.  Only KTO's z0 is estimated on these, so the cut loses
    nothing that is trained on.
    """
    starts = [s.mask.index(True) for s in samples]
    out = []
    for i, sample in enumerate(samples):
        other, here, there = samples[i - 1], starts[i], starts[i - 1]
        tokens = sample.tokens[:here] + other.tokens[there:]
        mask = [False] * here + other.mask[there:]
        out.append(Sample(tokens[:limit], mask[:limit]))
    return out


@dataclass(frozen=True, slots=True)
class Baseline:
    """KTO's z0: how far the policy has left the reference on completions of other prompts.

    policy, frozen  log-probs under the weights as they are, and under the reference
    limit           tokens of the longest sequence
    """

    policy: LogProbs
    frozen: LogProbs
    limit: int

    def log_ratio(self, units: Sequence[Unit], device: torch.device) -> float:
        """Summed log-ratio of the mismatched completions of all units but the first, nats."""
        samples = mismatched([unit[0].sample for unit in units], self.limit)[1:]
        batch = pack_units([(LabelledSample(s, False),) for s in samples if any(s.mask)], 1, device)
        return float((self.policy(batch) - self.frozen(batch)).double().sum())


class Preferences:
    """`count` units a step, out of `size`: pairs, or labelled examples.

    reference  (indices, their batch) -> (T,) log-probs under the reference model; None where the loss has
               none
    baseline   what estimates KTO's z0 on a step's prompts; None for losses without
    """

    def __init__(
        self,
        items: Items,
        size: int,
        algorithm: Preference,
        *,
        count: int,
        seed: int,
        device: torch.device,
        world: World,
        reference: Reference | None = None,
        baseline: Baseline | None = None,
    ) -> None:
        if algorithm.mismatched and count < 2:
            raise UserError(
                "--prompts: expected at least 2 to compare each prompt with another's completion, "
                f"got {count}"
            )
        if algorithm.mismatched and baseline is None:
            raise ValueError("baseline: expected a Baseline, because the loss estimates z0; got None")
        self.items, self.size, self.count, self.seed = items, size, count, seed
        self.reference, self.baseline = reference, baseline if algorithm.mismatched else None
        self.device, self.world = device, world

    def collect(self, step: int, version: int) -> Step[Batch]:
        """The units of `step`, one batch."""
        chosen = order(self.size, self.seed, step * self.count, self.count)
        places = self.world.share(self.count)
        indices = [chosen[place] for place in places]

        batch = pack_units(self.items(indices), self.count, self.device)
        if self.reference is not None:
            batch = replace(batch, ref_logp=self.reference(indices, batch))
        if self.baseline is None:
            return Step([batch])

        before = [chosen[place - 1] for place in places[:1]]
        z0 = self._z0(self.baseline, before + indices if indices else [])
        return Step([replace(batch, baseline=torch.full_like(batch.weight, z0))], {"kl": z0})

    def state(self) -> State:
        """Nothing: every step is a function of its number."""
        return {}

    def load_state(self, state: State) -> None:
        """Nothing to restore."""

    def _z0(self, baseline: Baseline, indices: Sequence[int]) -> float:
        """max(0, mean log-ratio of mismatched completions) over the whole step.

        `indices` are this process's, after the one before them.
        """
        local = baseline.log_ratio(self.items(indices), self.device) if indices else 0.0
        return max(0.0, self.world.sum(local)[0] / self.count)
