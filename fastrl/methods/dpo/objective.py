"""The loss of whole units: pairs, labelled examples, or groups of completions that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrl.algorithms.group_preference import GroupPreference
from fastrl.algorithms.preference import Preference
from fastrl.algorithms.row import LossRow
from fastrl.batch.pack import micro_batches
from fastrl.batch.types import Batch, Tokens
from fastrl.model.language import LanguageModel
from fastrl.train.objective import PartNumbers, score_tokens
from fastrl.train.source import Metrics


class UnitLoss(LossRow, Protocol):
    """An algorithm whose loss is of `unit` sequences that lie next to each other."""

    @property
    def unit(self) -> int:
        """Sequences that stay together in a micro-batch."""

    def measure(self, tokens: Tokens) -> Tensor:
        """Sums over these sequences, float64, for `merge`."""

    def merge(self, rows: Sequence[Sequence[float]]) -> Metrics:
        """A step's metrics, "num_tokens" among them, from the sums of every micro-batch of every process."""


@dataclass(frozen=True, slots=True)
class UnitObjective:
    """The loss of whole units, a mean over those of the optimizer step."""

    model: LanguageModel
    algorithm: UnitLoss
    temperature: float = 1.0

    def split(self, batch: Batch, budget: int) -> Iterable[Batch]:
        """Micro-batches of whole units."""
        return micro_batches(batch, budget, self.algorithm.unit)

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss; the loss and the algorithm's sums."""
        algorithm = known(self.algorithm, part)
        scored = score_tokens(self.model, part, algorithm, self.temperature)

        with torch.no_grad():
            sums = algorithm.measure(scored.live_tokens)
            return scored.loss, torch.cat([scored.loss.detach().double().view(1), sums])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The step's metrics."""
        return {"loss": sum(row[0] for row in rows)} | self.algorithm.merge([row[1:] for row in rows])


def known(algorithm: UnitLoss, batch: Batch) -> UnitLoss:
    """The algorithm with what it looks up in a micro-batch: z0, or the pairs that rewards make."""
    if isinstance(algorithm, GroupPreference):
        return algorithm.known(batch)
    z0 = batch.baseline
    if not isinstance(algorithm, Preference) or z0 is None or not z0.numel():
        return algorithm
    return algorithm.with_params(baseline=z0[0])
