"""What other trainers do under the same names, as overrides of the table's rows: `--semantics trl | verl |
nemo`.

"paper", the default, is the published method.  A preset has a line for each row that its trainer has, and no
other row goes with it.  It changes constants, bounds and reductions only: to the trainer's defaults, or to
those of its own example of the method (verl: DAPO, CISPO, GMPO, GSPO; NeMo-RL: DAPO, CISPO).  What stays
different:

    all    Log-ratios are clamped to +-20 in verl; here they are bounded there before an exponential, with the
           gradient of the bound, of which every clip leaves less than 1e-8.  Means are of the whole optimizer
           step, where TRL's `grpo`, `sapo`, `bnpo` and `gspo`, and verl's GMPO, divide by counts of each
           micro-batch: the same where the step is one.  GDPO's last whitening is over samples, as in TRL and
           NeMo-RL; verl's is over tokens.
    trl    A row is TRL's `loss_type` of the same name (gspo, luspo: with
           importance_sampling_level="sequence"; two_sided: delta; lite_ppo: scale_rewards="batch"; gmpo: its
           experimental trainer) with every other option at its default: `dapo` clips at 0.2 / 0.2
           (epsilon_high defaults to epsilon; the paper's 0.28 has to be asked for), `dr_grpo` keeps the
           z-score (scale_rewards="group") and differs from `grpo` by its divisor alone.  Bounds that TRL
           wants to be given (of cispo, gspo, luspo, two_sided) are the paper's.  Its RLOO clips the ratio of
           the whole sequence, and has k1 in the reward; ours has neither: equal gradients on the first update
           of a batch at beta 0.  Its entropy bonus is a mean over tokens whatever the loss; ours is weighed
           as the loss is.  A token-level correction of a sequence-level ratio weighs each token's own
           gradient here, and there the mean of them; its use_bias_correction_kl (k3_is) then takes the
           sequence's ratio, ours the token's.
    verl   z-scores divide by std + 1e-6; the dual clip (3; 10 in its DAPO example) is on; token mean unless
           the loss fixes its own; the bound of CISPO is 1 + 0.2; GPG's alpha counts non-zero rewards; k3 is
           cut off at 10, where its gradient becomes 0.  A group of one has the raw reward as its advantage
           there; such runs are refused here.  What a mask of the sampler against the trainer rejects
           (token_mask, sequence_mask, geometric_mask: its rollout_rs) leaves the loss, KL, entropy and every
           denominator; whitened advantages are over all tokens here, there over those that are
           left.  Its Dr. GRPO divides by the padded length unless
           `loss_scale_factor` is set; ours by the generation budget.  Its GSPO holds log-ratios below 10,
           ours below 20.
    nemo   The baseline leaves the sample out, and so does the deviation (`leave_one_out_zscore`, eps 1e-6),
           but for DAPO's example; token mean for every token-level row, Dr. GRPO and RLOO included; the bound
           of CISPO is 1 + 5; whitening divides by the biased deviation; the loss of k3 has the score
           function's term, which makes its gradient that of k2, and none where k3 exceeds 10.

A rejected token counts in the denominators of TRL (`vllm_importance_sampling_mode`), NeMo-RL (icepop,
seq-mask-tis) and OpenRLHF (the same names), as in the published methods: they multiply its loss by 0.

Sources: TRL 1.16 (`GRPOTrainer._compute_loss`), verl `core_algos.py` at 1dda039 and 018f23b and
`rollout_corr_helper.py` at 0b4e2a8, NeMo-RL's `loss_functions.py` and `advantage_estimator.py` at 7ea279a and
006907a.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.aggregate import token_mean
from fastrl.algorithms.correction import Correction
from fastrl.errors import UserError
from fastrl.ops import SURROGATES

Columns = dict[str, Any]


def clip(low: float, high: float, cap: float = math.inf) -> Columns:
    """The column of PPO's clip."""
    return {"surrogate": SURROGATES["clip"].with_params(low=low, high=high, cap=cap)}


def _advantage(name: str, **params: Any) -> Columns:
    return {"advantage": ADVANTAGES[name].with_params(**params)}


def _cispo(high: float) -> Columns:
    return {"surrogate": SURROGATES["cispo"].with_params(high=high)}


_SAME: Columns = {}
_TOKENS: Columns = {"aggregate": token_mean}
_DUAL, _DAPO = clip(0.2, 0.2, 3.0), clip(0.2, 0.28, 10.0)
_EPS6, _LOO = _advantage("zscore", eps=1e-6), _advantage("leave_one_out_zscore")
# preset -> row that its trainer has -> the columns it changes
SEMANTICS: dict[str, dict[str, Columns]] = {
    "trl": {
        **dict.fromkeys(
            (
                "grpo",
                "bnpo",
                "lite_ppo",
                "two_sided",
                "gspo",
                "luspo",
                "gmpo",
                "cispo",
                "sapo",
                "vespo",
                "rloo",
            ),
            _SAME,
        ),
        "dapo": clip(0.2, 0.2),
        "dr_grpo": _advantage("zscore"),
    },
    "verl": {
        "grpo": _EPS6 | _DUAL | _TOKENS,
        "dr_grpo": _DUAL,
        "dapo": _EPS6 | _DAPO,
        "gspo": _EPS6,
        "gmpo": _EPS6,
        "cispo": _EPS6 | _cispo(1.2),
        "sapo": _EPS6,
        "rloo": _DUAL | _TOKENS,
        "reinforce++": _DUAL,
        "reinforce++_baseline": _DUAL,
        "gpg": _advantage("gpg", zero="reward"),
    },
    "nemo": {
        "grpo": _LOO | _TOKENS,
        "dr_grpo": _advantage("rloo") | _TOKENS,
        "dapo": _EPS6 | _DAPO,
        "gspo": _LOO,
        "cispo": _LOO | _cispo(6.0),
        "rloo": _TOKENS,
        "reinforce++": _advantage("whiten", ddof=0),
        "reinforce++_baseline": _advantage("center_whiten", ddof=0),
    },
}
DROPS = ("verl",)  # trainers that count only what a mask of sampler against trainer keeps
# preset -> estimator that its trainer has -> ours that does the same
KL: dict[str, dict[str, str]] = {
    "trl": {"k3": "k3", "k3_is": "k3_is"},
    "verl": {"k1": "k1", "k2": "k2", "abs": "abs", "k3": "k3_cut", "k3+": "k3+"},
    "nemo": {"k3": "k3+_cut"},
}


def columns(semantics: str, name: str) -> Columns:
    """The columns of the row `name` that a preset changes.  Raises UserError for an unknown preset, and for a
    row that its trainer does not have.
    """
    if semantics == "paper":
        return {}
    if semantics not in SEMANTICS:
        raise UserError(f"--semantics: expected one of paper, {', '.join(SEMANTICS)}; got {semantics!r}")
    rows = SEMANTICS[semantics]
    if name not in rows:
        raise UserError(
            f"--semantics: {semantics} has no {name}; leave it out, or take one of its own: {', '.join(rows)}"
        )
    return rows[name]


def settled(semantics: str, correction: Correction) -> Correction:
    """A correction as a preset's trainer counts what it rejects."""
    return replace(correction, drops=semantics in DROPS and correction.masks)


def estimator(semantics: str, name: str) -> str:
    """Our KL estimator that does what a preset's trainer does under `name`.  Raises UserError if that trainer
    has none of this name.
    """
    known = KL.get(semantics, {name: name})
    if name not in known:
        raise UserError(
            f"--kl: expected an estimator of --semantics {semantics}: {', '.join(known)}; got {name}"
        )
    return known[name]
