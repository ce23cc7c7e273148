"""Options of `fastrl dpo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastrl.config.algorithm import (
    NOT_NEGATIVE,
    POSITIVE,
    AlgorithmChoice,
    Range,
    RowOption,
    RowOptions,
    Rows,
    WithAlgorithm,
)

BETA = RowOption(
    float, "Strength of the pull towards the reference model: the scale of log-ratios.", POSITIVE
)
NLL_COEF = RowOption(
    float, "Weight of the chosen completion's cross-entropy beside the loss of the pair.", NOT_NEGATIVE
)
SCALE = RowOption(float, "Scale of the difference of scores; there is no reference model.", POSITIVE)
LABEL_SMOOTHING = RowOption(
    float,
    "Share of the labels assumed to be wrong.",
    Range(lambda x: 0 < x < 0.5, "a share above 0 and below 0.5"),
)

PAIRS: RowOptions = {"beta": BETA, "nll_coef": NLL_COEF}
NOISY_PAIRS: RowOptions = {**PAIRS, "label_smoothing": LABEL_SMOOTHING}
WITHOUT_REFERENCE: RowOptions = {"beta": SCALE, "nll_coef": NLL_COEF}
LABELLED: RowOptions = {
    "beta": BETA,
    "desirable_weight": RowOption(float, "Weight of good examples.", POSITIVE),
    "undesirable_weight": RowOption(float, "Weight of bad examples.", POSITIVE),
}

ROWS: Rows = {
    "dpo": PAIRS,
    "cdpo": NOISY_PAIRS,
    "robust": NOISY_PAIRS,
    "hinge": PAIRS,
    "ipo": PAIRS,
    "dpo_norm": PAIRS,
    "ld_dpo": PAIRS,
    "dpop": {
        **PAIRS,
        "penalty": RowOption(
            float, "Weight of DPOP's penalty when the chosen completion becomes less likely.", NOT_NEGATIVE
        ),
    },
    "rpo": PAIRS,
    "exo": NOISY_PAIRS,
    "nca": PAIRS,
    "bco": PAIRS,
    "sppo": PAIRS,
    "apo_zero": PAIRS,
    "apo_down": PAIRS,
    "discopop": {
        **PAIRS,
        "tau": RowOption(
            float, "Temperature of the blend of the logistic and the exponential loss.", POSITIVE
        ),
    },
    "dpo_forward_kl": PAIRS,
    "dpo_js": PAIRS,
    "dpo_alpha": PAIRS,
    "simpo": {**WITHOUT_REFERENCE, "gamma": RowOption(float, "Target margin.", NOT_NEGATIVE)},
    "cpo": WITHOUT_REFERENCE,
    "orpo": {**WITHOUT_REFERENCE, "beta": RowOption(float, "Weight of the odds-ratio term.", POSITIVE)},
    "kto": LABELLED,
    "apo_zero_unpaired": LABELLED,
}
TRL_NAMES = {  # its loss_type -> our row
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo(WithAlgorithm):
    """Preference optimisation: DPO and its relatives, on pairs of a chosen and a rejected completion or on
    labelled ones.
    """

    algorithm: AlgorithmChoice = field(default_factory=lambda: AlgorithmChoice("dpo"))
    """A row of fastrl.algorithms.preference.PREFERENCES (dpo, ipo, simpo, orpo, kto, ...), or TRL's name of
    it.
    """
    reference: Literal["precomputed", "live", "none"] | None = None
    """Log-probs of the reference model: computed once before training, or by a frozen copy at every step;
    None is precomputed, live or none as the algorithm needs.
    """

    rows: ClassVar[Rows] = ROWS
    other_names: ClassVar[Mapping[str, str]] = TRL_NAMES
