"""A policy and its reward model trained in turns: a row of the family, with what the reward model learns by.
See docs/joint.md.

Sampling has no derivative, and the reward must have none either: a policy's loss that reaches the reward
model teaches it to like what the policy says already.  So rewards are plain numbers here, on a scale that is
measured anew whenever the reward model has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import NamedTuple, Self

from fastrl.algorithms.objective import Algorithm
from fastrl.algorithms.reward import RewardLoss


class Scale(NamedTuple):
    """What takes a reward model's scores to mean 0 and deviation 1 on the calibration set."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, scores: Sequence[float]) -> Self:
        """The scale of these scores, all the set there is; where they are all equal only their mean is taken
        off.
        """
        deviation = pstdev(scores)
        return cls(fmean(scores), deviation if deviation > 0 else 1.0)

    def __call__(self, score: float) -> float:
        """The reward of a score."""
        return (score - self.mean) / self.deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTrained(Algorithm):
    """A method whose rewards come from a model that is trained along.

    reward_loss            scores of compared completions -> the reward model's loss
    reward_model, seed     where the reward model starts, and what a fresh head is drawn by
    reward_lr              its peak learning rate; None: the policy's
    reward_epochs          its optimizer steps per update
    """

    reward_loss: RewardLoss
    reward_model: str
    seed: int = 0
    reward_lr: float | None = None
    reward_epochs: int = 1
