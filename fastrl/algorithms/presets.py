"""What other trainers do under the same names, as overrides of the table's rows: `--semantics trl | verl | nemo`.

"paper", the default, is the published method.  A preset changes constants, bounds and reductions only; what stays different:

    trl    A row is TRL's `loss_type` of the same name with every other option at its default: `dapo` clips at 0.2 / 0.2 (TRL's
           epsilon_high defaults to epsilon; the paper's 0.28 has to be asked for), `dr_grpo` keeps the z-score (scale_rewards="group")
           and differs from `grpo` by its divisor alone.  TRL divides `grpo`, `sapo`, `bnpo` by counts of each micro-batch; here
           every denominator counts the whole optimizer step, which is TRL's value where the step is one micro-batch.  Its RLOO
           clips the ratio of the whole sequence; ours has none: equal gradients on the first update of a batch.  Its entropy bonus is
           a mean over tokens whatever the loss; ours is weighed as the loss is.  A token-level correction of a sequence-level ratio
           weighs each token's own gradient here, and there the mean of them.
    verl   z-scores divide by std + 1e-6; the dual clip (3; 10 in its DAPO recipe) is on; token mean unless the loss fixes its own;
           CISPO's bounds are relative, [1 - 0.2, 1 + 0.2]; GMPO clips at 0.2 log units; GPG's alpha counts non-zero rewards; k3 is
           cut off at 10, where its gradient becomes 0.  A group of one has the raw reward as its advantage there; such runs are
           refused here.  Its Dr. GRPO divides by the padded length unless `loss_scale_factor` is set; ours by the generation budget.
    nemo   the baseline leaves the sample out, and so does the deviation (`leave_one_out_zscore`, eps 1e-6); token mean for every
           token-level row, Dr. GRPO included; CISPO as in verl; k3 cut off at 10.

Sources: TRL 1.16 (`GRPOTrainer._compute_loss`), verl `core_algos.py` at 1dda039, NeMo-RL at 7ea279a.
"""

from __future__ import annotations

import math
from typing import Any

from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.aggregate import token_mean
from fastrl.ops import SURROGATES

_EPS6 = {"advantage": ADVANTAGES["zscore"].with_params(eps=1e-6)}
_LOO = {"advantage": ADVANTAGES["leave_one_out_zscore"]}
_RELATIVE = {"surrogate": SURROGATES["cispo"].with_params(low=0.8, high=1.2)}
_DUAL = {"surrogate": SURROGATES["clip"].with_params(cap=3.0)}


def _clip(low: float, high: float, cap: float = math.inf) -> dict[str, Any]:
    return {"surrogate": SURROGATES["clip"].with_params(low=low, high=high, cap=cap)}


SEMANTICS: dict[str, dict[str, dict[str, Any]]] = {  # preset -> row -> the columns it changes
    "paper": {},
    "trl": {
        "dapo": _clip(0.2, 0.2),
        "dr_grpo": {"advantage": ADVANTAGES["zscore"]},
    },
    "verl": {
        "grpo": _EPS6 | _DUAL | {"aggregate": token_mean},
        "dr_grpo": _DUAL,
        "dapo": _EPS6 | _clip(0.2, 0.28, 10.0),
        "gspo": _EPS6,
        "gmpo": _EPS6 | _clip(-math.expm1(-0.2), math.expm1(0.2)),
        "cispo": _EPS6 | _RELATIVE,
        "sapo": _EPS6,
        "rloo": _DUAL | {"aggregate": token_mean},
        "reinforce++": _DUAL,
        "reinforce++_baseline": _DUAL,
        "gpg": {"advantage": ADVANTAGES["gpg"].with_params(zero="reward")},
    },
    "nemo": {
        "grpo": _LOO | {"aggregate": token_mean},
        "dr_grpo": {"advantage": ADVANTAGES["rloo"], "aggregate": token_mean},
        "dapo": _LOO,
        "gspo": _LOO,
        "cispo": _LOO | _RELATIVE,
    },
}
KL: dict[str, dict[str, str]] = {"verl": {"k3": "k3_cut"}, "nemo": {"k3": "k3_cut"}}  # preset -> estimators it takes for others
