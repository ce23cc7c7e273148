"""Batches of the fusions of preferences and reinforcement learning, and the learner of two terms: see
algorithms/fusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.algorithms.group_preference import GroupPreference, under_pairs
from fastrl.algorithms.hybrid import HybridAlgorithm
from fastrl.batch.types import Batch
from fastrl.config import Hybrid
from fastrl.errors import UserError
from fastrl.methods.dpo.batches import Preferences, Preferred, backward_of_units
from fastrl.methods.grpo.draw import Draw
from fastrl.methods.grpo.rollouts import OnPolicy, Step
from fastrl.methods.hybrid.mixture import MixedLearner, Mixture


# --- a policy loss, and offline pairs beside it -------------------------------------------------------
@dataclass(frozen=True, slots=True)
class FusedBatch:
    """One optimizer step's data of a fused row.

    own       rollouts
    pairs     offline pairs, their weights multiplied by `coef`; None where that is 0
    measured  whether the gradient's norm is asked for term by term
    """

    own: Batch
    pairs: Preferred | None
    coef: float
    measured: bool


class FusedSource:
    """Rollouts, and with each of their batches the next pairs: those that `fastrl dpo` has at the same
    optimizer step.
    """

    def __init__(self, rollouts: Mixture, pairs: Preferences) -> None:
        assert rollouts.row.pairs is not None
        self.rollouts, self.pairs, self.config = rollouts, pairs, rollouts.config
        self.coef = rollouts.row.pairs.coef

    def collect(self, step: int, version: int) -> Step:
        drawn, config = self.rollouts.collect(step, version), self.config
        coef = self.coef(step, config.steps)
        every = config.algorithm.count("norms_every", 0)
        measured = every > 0 and step % every == 0
        batches = []
        for k, own in enumerate(drawn.batches):
            pairs = self._weighed(step * len(drawn.batches) + k, version, coef) if coef else None
            batches.append(FusedBatch(own, pairs, coef, measured))
        return Step(batches, drawn.metrics | {"hybrid/pair_coef": coef}, drawn.samples)  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        return self.rollouts.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.rollouts.load_state(state)

    def _weighed(self, number: int, version: int, coef: float) -> Preferred:
        (batch,) = self.pairs.collect(number, version).batches
        assert isinstance(batch, Preferred)
        return replace(batch, weight=batch.weight * coef)


class FusedLearner(MixedLearner):
    """The learner whose step is the sum of both terms' gradients."""

    algorithm: HybridAlgorithm

    def _gradients(self, batch: FusedBatch) -> dict[str, float]:  # type: ignore[override]
        assert self.algorithm.pairs is not None
        row = self.algorithm.pairs.preference
        own = self._backward(batch.own)
        first = [None if p.grad is None else p.grad.clone() for p in self.masters] if batch.measured else []
        pairs = [] if batch.pairs is None else backward_of_units(self, batch.pairs, row)
        self.world.sum_gradients(self.masters)
        norms = self._norms(first) if batch.measured else {}
        told = self._merged(self.world.gather(own))
        if batch.pairs is None:
            return told | norms
        table = self.world.gather(pairs)
        loss, merged = math.fsum(r[0] for r in table), row.merge([r[1:] for r in table])
        both = {"loss": told["loss"] + loss, "num_tokens": told["num_tokens"] + merged["num_tokens"]}
        return told | norms | under_pairs(merged) | {"pairs/loss": loss / batch.coef} | both

    def _norms(self, first: Sequence[Tensor | None]) -> dict[str, float]:
        """The L2 norm of each term's gradient as it is in the sum, coefficients included; the sum is in the
        masters.

        `first` is this process's part of the policy's gradient.  No pass over the data more: the pairs'
        gradient is what the sum has beside it.
        """
        whole = [p.grad for p in self.masters]
        for p, grad in zip(self.masters, first, strict=True):
            p.grad = grad
        self.world.sum_gradients(self.masters)
        zero = torch.zeros(())
        own = [zero if p.grad is None else p.grad for p in self.masters]
        for p, grad in zip(self.masters, whole, strict=True):
            p.grad = grad
        pairs = [a if g is None else g - a for g, a in zip(whole, own, strict=True)]
        return {f"grad_norm/{name}": _norm(grads) for name, grads in (("rl", own), ("pairs", pairs))}


def _norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(g.double().square().sum()) for g in grads))


# --- a group's completions against each other ---------------------------------------------------------
class Contrasted(OnPolicy):
    """Rollouts whose advantage column is their reward: whole prompts, and of each the completions that the
    row keeps.

    Raises UserError for settings that have no meaning in it.
    """

    algorithm: GroupPreference  # type: ignore[assignment]
    config: Hybrid

    def __init__(self, config: Hybrid, *others: object, **named: object) -> None:
        for option, value, fine, expected in (
            (
                "--group",
                config.group,
                config.group >= 2,
                "at least 2 completions of a prompt, to compare them",
            ),
            (
                "--multi-objective-aggregation",
                config.multi_objective_aggregation,
                config.multi_objective_aggregation == "sum_then_normalize",
                "sum_then_normalize: completions are compared by one reward",
            ),
        ):
            if not fine:
                raise UserError(f"{option}: expected {expected}, got {value}")
        super().__init__(config, *others, **named)  # type: ignore[arg-type]

    def _advantage(self, draw: Draw, own: list[int]) -> Tensor:
        """The rewards, NaN of a completion that has none or does not count."""
        rollouts, reward = draw.rollouts, draw.reward
        cut = [self.config.overlong_filter and reason == "length" for reason in rollouts.finish_reason]
        gone = (rollouts.lengths == 0) | torch.tensor(cut, dtype=torch.bool, device=reward.device)
        return torch.where(gone, torch.nan, reward)[own]

    def _batch(self, draw: Draw, own: list[int], advantage: Tensor) -> Batch:
        G = self.config.group
        kept = self.algorithm.kept(advantage.view(-1, G))
        at = (kept + G * torch.arange(len(kept), device=kept.device)[:, None]).flatten()
        batch = super()._batch(draw, [own[i] for i in at.tolist()], advantage[at])
        return replace(batch, ref_logp=batch.old_logp) if self.algorithm.anchor == "old" else batch

    def _weigh(self, part: Batch) -> Batch:
        """The weights of the groups with something to compare; the others leave the batch."""
        row = self.algorithm
        units = row.units(part.advantage[part.cu_seqlens[:-1].long()].view(-1, row.unit))
        (count,) = self.world.sum(float(units.sum()))
        some = [g * row.unit + i for g in units.nonzero().flatten().tolist() for i in range(row.unit)]
        part = part if len(some) == len(part) else part.select(some)
        return replace(part, weight=torch.full_like(part.weight, 1 / max(count, 1)))

    def _live(self, batch: Batch) -> Batch:
        return batch
