"""A policy and its reward model trained in turns: an algorithm for the policy, and the reward model's loss.
See docs/joint.md.

Sampling has no derivative, and the reward must have none either: a policy loss that reaches the reward model
would teach it to prefer the policy's own completions.  So rewards are constants here, on a scale that is
measured again after each update of the reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import NamedTuple, Self

from fastrl.algorithms.objective import Algorithm, HoldsPolicy
from fastrl.algorithms.reward import RewardLoss


class Scale(NamedTuple):
    """Shift and scale of a reward model's scores, to mean 0 and deviation 1 on the calibration set."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, scores: Sequence[float]) -> Self:
        """The scale of the calibration set's scores; where all are equal, only their mean is subtracted."""
        deviation = pstdev(scores)
        return cls(fmean(scores), deviation if deviation > 0 else 1.0)

    def __call__(self, score: float) -> float:
        """The reward of a score."""
        return (score - self.mean) / self.deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class JointAlgorithm(HoldsPolicy):
    """A method that trains the model its rewards come from.

    policy                 trains the policy on the reward model's rewards
    reward_loss            scores of compared completions -> the reward model's loss
    reward_model, seed     the reward model's initial weights; the seed of a fresh head
    reward_lr              its peak learning rate; None is the policy's
    reward_epochs          its optimizer steps per update
    """

    policy: Algorithm
    reward_loss: RewardLoss
    reward_model: str
    seed: int = 0
    reward_lr: float | None = None
    reward_epochs: int = 1
