"""Options of `fastrl reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastrl.config.algorithm import NOT_NEGATIVE, AlgorithmChoice, RowOption, RowOptions, Rows, WithAlgorithm
from fastrl.config.run import Eval

COMPARED: RowOptions = {
    "center": RowOption(
        float,
        "Weight of the squared sum of a pair's rewards, which keeps rewards near 0; 0 unless given, 0.01 is "
        "usual.",
        NOT_NEGATIVE,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut(Eval):
    """Accuracy of a reward model on held-out data."""

    prompts: int = 256
    """Held-out prompts per evaluation, with all their completions; 0 turns evaluation off and trains on
    everything.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward(WithAlgorithm):
    """Reward models: a score for every completion, from comparisons, rankings, or right and wrong answers."""

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("bradley_terry"))
    """A row of fastrl.algorithms.reward.REWARD_LOSSES: bradley_terry, plackett_luce, outcome or process."""
    group: int = 2
    """Completions per prompt of a --task: a right one and wrong ones."""
    holdout: float = 0.05
    """Share of a dataset's prompts that is kept for evaluation."""
    eval: HeldOut = field(default_factory=HeldOut)

    rows: ClassVar[Rows] = {
        "bradley_terry": COMPARED,
        "plackett_luce": COMPARED,
        "outcome": {},
        "process": {
            "step_separator": RowOption(
                str, "Text that ends each step of a completion; a line break unless given."
            )
        },
    }
