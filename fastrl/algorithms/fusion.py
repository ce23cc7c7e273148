"""Preferences and reinforcement learning in one step: the table of fusions, beside that of hybrids with
demonstrations.

A fusion is one of three kinds: a policy loss with a loss of offline pairs beside it, each with denominators
of its own (`pairs`); a group with the prompt's pair as two more members (`sides=2`); or a group whose own
completions are compared with each other (`GroupPreference`).  The equations are in docs/hybrid.md.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastrl.algorithms.group_preference import GroupPreference, Listwise, OnlinePairs
from fastrl.algorithms.hybrid import HYBRIDS, Estimator, HybridAlgorithm, OfflinePairs, Parts, Rule
from fastrl.algorithms.objective import ALGORITHMS
from fastrl.algorithms.preference import PREFERENCES
from fastrl.ops import SURROGATES


def _own(solved: Tensor, present: Tensor, step: int, steps: int, *, rl_coef: float) -> Parts:
    return rl_coef, 0.0, 0.0


_DPO = PREFERENCES["dpo"]
_AVERAGED = replace(_DPO.with_params(beta=1.0), average=True)
_UNION = Rule(HYBRIDS["luffy"].rule.compute)

FUSIONS: dict[str, HybridAlgorithm | GroupPreference] = {
    "grpo_dpo": HybridAlgorithm(
        policy=ALGORITHMS["grpo"],
        rule=Rule(_own, {"rl_coef": 1.0}),
        known="nothing",
        pairs=OfflinePairs(_DPO),
    ),
    "grpo_pairs": HybridAlgorithm(
        policy=ALGORITHMS["grpo"],
        rule=_UNION,
        member=Estimator(SURROGATES["ratio"], "one"),
        known="pairs",
        sides=2,
    ),
    "luffy_pairs": HybridAlgorithm(
        policy=replace(ALGORITHMS["dr_grpo"], surrogate=SURROGATES["ratio"]),
        rule=_UNION,
        member=Estimator(SURROGATES["luffy_off"], "one"),
        known="pairs",
        sides=2,
    ),
    "online_dpo": GroupPreference(preference=_DPO, comparison=OnlinePairs()),
    "group_softmax": GroupPreference(preference=_DPO, comparison=Listwise()),
    "group_softmax_norm": GroupPreference(preference=_AVERAGED, comparison=Listwise()),
}
