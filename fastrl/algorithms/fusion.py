"""Preferences and reinforcement learning in one step: the table of fusions, beside that of hybrids with
demonstrations.

A row is one of three kinds.  `Fused`: a policy loss, and a loss of offline pairs beside it, each with its own
denominators.  `Mixed` with two sides: the completions of a prompt's pair are members of its group.
`Contrast`: the group's own completions are the pairs, or a list.  The equations are in docs/hybrid.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastrl.algorithms.contrast import Contrast, Listwise, OnlinePairs
from fastrl.algorithms.hybrid import HYBRIDS, Estimator, Mixed, Parts, Rule, mix, rise_and_fall
from fastrl.algorithms.objective import ALGORITHMS
from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.ops import SURROGATES


@dataclass(frozen=True, slots=True)
class Schedule:
    """The weight of a term over a run: from 0 to `peak` over `warmup` steps, then by half a cosine to `end`
    over `decay` (0: the rest).
    """

    peak: float = 1.0
    end: float = 0.0
    warmup: int = 0
    decay: int = 0

    def __call__(self, step: int, steps: int) -> float:
        return rise_and_fall(step, steps, peak=self.peak, end=self.end, warmup=self.warmup, decay=self.decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused(Mixed):
    """A row whose loss is its own, and `coef` times `preference`'s on offline pairs, a mean over the pairs of
    the optimizer step.
    """

    preference: Preference
    coef: Schedule = Schedule()


def _own(solved: Tensor, there: Tensor, step: int, steps: int, *, rl_coef: float) -> Parts:
    return rl_coef, 0.0, 0.0


_DPO = PREFERENCES["dpo"]
_AVERAGED = replace(_DPO.with_params(beta=1.0), average=True)
_UNION = Rule(HYBRIDS["luffy"].rule.compute)
FUSIONS: dict[str, Mixed | Contrast] = {
    "grpo_dpo": mix(
        ALGORITHMS["grpo"], Rule(_own, {"rl_coef": 1.0}), kind=Fused, known="nothing", preference=_DPO
    ),
    "grpo_pairs": mix(
        ALGORITHMS["grpo"], _UNION, member=Estimator(SURROGATES["ratio"], "one"), known="pairs", sides=2
    ),
    "luffy_pairs": mix(
        ALGORITHMS["dr_grpo"],
        _UNION,
        surrogate=SURROGATES["ratio"],
        member=Estimator(SURROGATES["luffy_off"], "one"),
        known="pairs",
        sides=2,
    ),
    "online_dpo": OnlinePairs(preference=_DPO),
    "group_softmax": Listwise(preference=_DPO),
    "group_softmax_norm": Listwise(preference=_AVERAGED),
}


# --- from a run's options to a row ------------------------------------------------------------------
