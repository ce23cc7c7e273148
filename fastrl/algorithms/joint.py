"""A policy and its reward model trained in turns: a row of the family, with what the reward model learns by.
See docs/joint.md.

Sampling has no derivative, and the reward must have none either: a policy's loss that reaches the reward
model teaches it to like what the policy says already.  So rewards are plain numbers here, on a scale that is
measured anew whenever the reward model has moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, pstdev
from typing import NamedTuple, Self

from fastrl.algorithms.objective import Algorithm
from fastrl.algorithms.reward import REWARD_LOSSES, RewardLoss
from fastrl.config import Joint
from fastrl.errors import UserError
from fastrl.files import nearest
from fastrl.methods.grpo.options import choose_algorithm


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


def choose_joint(config: Joint) -> CoTrained:
    """The family's row with the reward model's part.  Raises UserError for options that do not go together."""
    rows = [name for name, row in REWARD_LOSSES.items() if row.compares]
    if config.reward_loss not in rows:
        got = f"{config.reward_loss!r}{nearest(config.reward_loss, rows)}"
        raise UserError(
            f"--reward-loss: expected one that compares completions, {' or '.join(rows)}; got {got}"
        )
    base = choose_algorithm(config)
    assert base.advantage is not None
    share, compared = config.offline_share, config.group * config.max_new_tokens
    by = "algorithm" if config.advantage is None else "advantage"
    for name, fine, expected in (
        ("group", config.group >= 2, "at least 2 completions of a prompt, to compare them"),
        ("center", 0 <= config.center < math.inf, "a number of 0 or more"),
        ("reward_lr", config.reward_lr is None or 0 <= config.reward_lr < math.inf, "a number of 0 or more"),
        ("reward_every", config.reward_every >= 1, "at least 1 step"),
        ("reward_epochs", config.reward_epochs >= 1, "at least 1"),
        ("calibration", config.calibration >= 2, "at least 2 completions, to have a deviation"),
        ("offline_share", 0 <= share < 1, "a share of at least 0 and below 1"),
        ("offline", config.offline is None or share > 0, "none at --offline-share 0; give a share"),
        ("refill", config.refill == 0, "0: a reward model hardly ever gives a group equal rewards"),
        (by, base.advantage.signed, "one that takes rewards below 0, as standardised ones are (not max_rl)"),
        (
            "micro_tokens",
            config.micro_tokens >= compared,
            f"--group x --max-new-tokens ({compared}) or more, to compare a group in one pass",
        ),
    ):
        if not fine:
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}; got {getattr(config, name)}")
    return CoTrained(
        **{f.name: getattr(base, f.name) for f in fields(Algorithm)},
        reward_model=config.reward_model or config.model,
        seed=config.seed,
        reward_loss=replace(REWARD_LOSSES[config.reward_loss], center=config.center),
        reward_lr=config.reward_lr,
        reward_epochs=config.reward_epochs,
    )
