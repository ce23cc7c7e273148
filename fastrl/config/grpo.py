"""Options of `fastrl grpo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastrl.config.algorithm import POSITIVE, AlgorithmChoice, RowOption, Rows
from fastrl.config.on_policy import CLIP, PASS_K, GroupRelative

ROWS: Rows = {
    "grpo": CLIP,
    "dr_grpo": CLIP,
    "dapo": CLIP,
    "bnpo": CLIP,
    "lite_ppo": CLIP,
    "two_sided": CLIP,
    "gspo": CLIP,
    "luspo": CLIP,
    "gmpo": {
        "epsilon": RowOption(
            float,
            "The log-ratio is clipped to [-epsilon, epsilon_high]; given alone, epsilon sets both.",
            POSITIVE,
        ),
        "epsilon_high": RowOption(float, "Upper bound of the log-ratio; see epsilon.", POSITIVE),
    },
    "cispo": {"epsilon_high": RowOption(float, "Largest importance weight of a token.", POSITIVE)},
    "sapo": {},
    "vespo": {},
    "rloo": {},
    "reinforce++": CLIP,
    "reinforce++_baseline": CLIP,
    "gpg": {},
    "pass_at_k": {**CLIP, "pass_k": PASS_K},
    "max_rl": CLIP,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo(GroupRelative):
    """Reinforcement learning from verified rewards: the GRPO family."""

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("grpo"))
    """A row of fastrl.algorithms.ALGORITHMS other than sft."""
    refill: int = 0
    """Dynamic sampling: drop groups of equal rewards, and fill the batch in up to this many rounds of further
    prompts.
    """

    rows: ClassVar[Rows] = ROWS
