"""Options of `fastrl reward`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrl.config.run import Eval, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut(Eval):
    """Accuracy of a reward model on what it is not trained on."""

    prompts: int = 256
    """Held-out prompts per evaluation, with all their completions; 0 turns evaluation off and trains on
    everything.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward(Run):
    """Reward models: a score for every completion, from comparisons, rankings, or right and wrong answers."""

    algorithm: str = "bradley_terry"
    """A row of fastrl.algorithms.reward.REWARD_LOSSES."""
    center: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards near 0; 0.01 is usual.  Not for
    verdicts.
    """
    group: int = 2
    """Completions of a prompt that a task gives: a right one, and wrong ones."""
    step_separator: str = "\n"
    """What ends a step of a completion whose steps are judged."""
    holdout: float = 0.05
    """Share of a dataset's prompts that is kept for evaluation, not trained on."""
    eval: HeldOut = field(default_factory=HeldOut)
