"""Preference optimisation: where a step's pairs or labelled examples come from, and the learner that trains
on them.

Like every source (see experience.py), what a step gets is a function of the step's number alone, for any
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.preference import Preference
from fastrl.batch.pack import micro_batches
from fastrl.batch.types import Batch
from fastrl.data.pairs import Judged, Unit
from fastrl.data.rows import Sample
from fastrl.errors import UserError
from fastrl.methods.grpo.rollouts import Step, order
from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World
from fastrl.train.learner import Learner

Items = Callable[[Sequence[int]], list[Unit]]
# (items, the batch made of them) -> (T,) log-probs of the reference model
Reference = Callable[[Sequence[int], Batch], Tensor]


def pack_units(units: Sequence[Unit], count: int, device: torch.device) -> Batch:
    """The batch of `units`, which are `count` over all processes; no reference log-probs yet."""
    judged = [one for unit in units for one in unit]
    lengths = torch.tensor([len(one.sample.tokens) for one in judged], dtype=torch.int64, device=device)
    sign = torch.tensor([1.0 if one.good else -1.0 for one in judged], dtype=torch.float32, device=device)
    tokens = torch.tensor([t for one in judged for t in one.sample.tokens], dtype=torch.int64, device=device)
    zeros = torch.zeros(tokens.shape, device=device)
    return Batch(
        tokens=tokens,
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
        mask=torch.tensor([m for one in judged for m in one.sample.mask], dtype=torch.bool, device=device),
        advantage=sign.repeat_interleave(lengths),
        old_logp=zeros,
        weight=torch.full_like(zeros, 1 / count),
    )


def mismatch(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Each prompt with the completion of the sample before it (the first with the last's); cut at `limit`
    tokens.

    A prompt is all before the first token that counts.  Only KTO's z0 is estimated on these, so a cut loses
    nothing that is trained on.
    """
    starts = [s.mask.index(True) for s in samples]
    out = []
    for i, sample in enumerate(samples):
        other, here = samples[i - 1], starts[i]
        tokens = sample.tokens[:here] + other.tokens[starts[i - 1] :]
        out.append(Sample(tokens[:limit], ([False] * here + other.mask[starts[i - 1] :])[:limit]))
    return out


class Preferences:
    """A batch of `count` units a step out of `size`: pairs, or labelled examples.

    reference(indices, batch) -> (T,) log-probs under the reference model, or None when the row needs none.
    policy(batch) -> (T,) log-probs under the weights as they are, and frozen(batch) -> those of the
    reference: for KTO's z0, which is estimated on the step's prompts, each with the completion of the one
    before; `limit` is the longest sequence.
    """

    def __init__(
        self,
        items: Items,
        size: int,
        row: Preference,
        *,
        count: int,
        seed: int,
        device: torch.device,
        world: World,
        reference: Reference | None = None,
        policy: Callable[[Batch], Tensor] | None = None,
        frozen: Callable[[Batch], Tensor] | None = None,
        limit: int = 0,
    ) -> None:
        if row.mismatched and (count < 2 or policy is None or frozen is None):
            raise UserError(
                "--prompts: expected at least 2 to compare each prompt with another's completion, "
                f"got {count}"
            )
        self.items, self.size, self.row, self.count, self.seed = items, size, row, count, seed
        self.device, self.world, self.limit = device, world, limit
        self.reference, self.policy, self.frozen = reference, policy, frozen

    def collect(self, step: int, version: int) -> Step:
        chosen = order(self.size, self.seed, step * self.count, self.count)
        mine = self.world.share(self.count)
        indices = [chosen[i] for i in mine]
        batch = pack_units(self.items(indices), self.count, self.device)
        if self.reference is not None:
            batch = replace(batch, ref_logp=self.reference(indices, batch))
        if not self.row.mismatched:
            return Step([batch])
        z0 = self._baseline([chosen[i - 1] for i in mine[:1]] + indices)
        return Step([replace(batch, baseline=torch.full_like(batch.weight, z0))], {"kl": z0})

    def state(self) -> dict[str, Tensor]:
        """Nothing: every step is a function of its number."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def _baseline(self, indices: Sequence[int]) -> float:
        """max(0, mean log-ratio of mismatched completions) over the whole step; `indices` are this process's,
        after the one before them.
        """
        total = 0.0
        if indices:
            samples = mismatch([unit[0].sample for unit in self.items(indices)], self.limit)[1:]
            batch = pack_units([_unit(s) for s in samples if any(s.mask)], 1, self.device)
            assert self.policy is not None and self.frozen is not None
            total = float((self.policy(batch) - self.frozen(batch)).double().sum())
        return max(0.0, self.world.sum(total)[0] / self.count)


def _unit(sample: Sample) -> Unit:
    return (Judged(sample, False),)


class PreferenceLearner(Learner):
    """A learner whose algorithm is a row of PREFERENCES: micro-batches of whole units, metrics of whole
    sequences.
    """

    algorithm: Preference  # type: ignore[assignment]

    def _gradients(self, batch: Batch) -> dict[str, float]:
        """Leave the whole step's gradient, all processes included, in the masters; the step's metrics."""
        row = at_baseline(self.algorithm, batch)
        rows = backward_of_units(self, batch, row)
        self.world.sum_gradients(self.masters)
        table = self.world.gather(rows)
        return {"loss": sum(r[0] for r in table)} | row.merge([r[1:] for r in table])


def backward_of_units(learner: Learner, batch: Batch, row: Any) -> list[list[float]]:
    """Add this process's gradient of the units in `batch` to the masters; of each micro-batch its loss and
    what the row measures.

    row  one of PREFERENCES, or whatever else has its `unit`, `loss` and `measure`
    """
    rows = []
    with memory_limited_by("--micro-tokens", learner.micro_tokens):
        for micro in micro_batches(batch, learner.micro_tokens, row.unit):
            loss, stats, tokens, live = learner.forward(micro, row)
            loss.backward()
            with torch.no_grad():
                seen = tokens[live].with_(
                    stats.logp[live], None if stats.entropy is None else stats.entropy[live]
                )
                rows.append(torch.cat([loss.detach().double().view(1), row.measure(seen)]))
    return torch.stack(rows).tolist() if rows else []


def at_baseline(row: Preference, batch: Batch) -> Preference:
    """The row with the batch's z0, where it has one."""
    z0 = batch.baseline
    return row if z0 is None or not z0.numel() else row.with_params(baseline=float(z0[0]))
