"""Options of `fastrl dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.config.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo(Run):
    """Preference optimisation: DPO and its relatives, on pairs of a chosen and a rejected completion or on
    labelled ones.
    """

    algorithm: str = "dpo"
    """A row of fastrl.algorithms.preference.PREFERENCES: dpo, ipo, simpo, orpo, kto, ...; TRL's names of them
    are taken too.
    """
    reference: Literal["precomputed", "live", "none"] | None = None
    """The reference model's log-probs: computed once before training, or by a frozen copy at every step.
    None: as the row needs them.
    """
    beta: float | None = None
    """Weight of the reference, or scale of the scores (orpo: of its odds term); None keeps the row's own, as
    for the options below.
    """
    label_smoothing: float | None = None
    """Share of the labels taken to be wrong (cdpo, robust, exo)."""
    gamma: float | None = None
    """Target margin (simpo)."""
    penalty: float | None = None
    """Weight of the chosen completion's loss of likelihood (dpop)."""
    tau: float | None = None
    """Sharpness of the blend (discopop)."""
    desirable_weight: float | None = None
    """Weight of good examples (kto)."""
    undesirable_weight: float | None = None
    """Weight of bad examples (kto)."""
    nll_coef: float | None = None
    """Weight of the chosen completion's cross-entropy, beside any loss of pairs."""
