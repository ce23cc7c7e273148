"""Rollouts with offline pairs beside them: the data of a policy loss plus a preference loss."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from fastrl.algorithms.hybrid import OfflinePairs
from fastrl.batch.types import Batch
from fastrl.config import Hybrid
from fastrl.methods.dpo.batches import Preferences
from fastrl.methods.grpo.rollouts import RolloutSource
from fastrl.methods.hybrid.objective import PolicyAndPairsBatch
from fastrl.train.source import State, Step


@final
class PolicyAndPairs:
    """Rollouts, and with each of their batches the pairs that `fastrl dpo` has at the same optimizer step."""

    def __init__(
        self, config: Hybrid, rollouts: RolloutSource, pairs: Preferences, offline: OfflinePairs
    ) -> None:
        self.config, self.rollouts, self.pairs, self.offline = config, rollouts, pairs, offline

    def collect(self, step: int, version: int) -> Step[PolicyAndPairsBatch]:
        """The step's rollouts, and the next pairs for each of its batches."""
        sampled, config = self.rollouts.collect(step, version), self.config
        coef = self.offline.coef(step, config.steps)
        every = config.algorithm.count("norms_every", 0)
        measured = every > 0 and step % every == 0

        batches = []
        for k, own in enumerate(sampled.batches):
            number = step * len(sampled.batches) + k
            pairs = self._weighed(number, version, coef) if coef else None
            batches.append(PolicyAndPairsBatch(own, pairs, coef, measured))
        return Step(batches, sampled.metrics | {"hybrid/pair_coef": coef}, sampled.samples)

    def state(self) -> State:
        """The groups that wait for the next step; the pairs are a function of the step's number."""
        return self.rollouts.state()

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        self.rollouts.load_state(state)

    def _weighed(self, number: int, version: int, coef: float) -> Batch:
        (batch,) = self.pairs.collect(number, version).batches
        return replace(batch, weight=batch.weight * coef)
