"""From the options of `fastrl sft` to its algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrl.algorithms import ALGORITHMS, Algorithm
from fastrl.algorithms.objective import HoldsPolicy
from fastrl.config import Sft
from fastrl.errors import UserError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedAlgorithm(HoldsPolicy):
    """Cross-entropy with the options of `fastrl.config.Sft`.

    policy  the loss of supervised tokens
    """

    policy: Algorithm = ALGORITHMS["sft"]
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune_alpha: float = 0.0


def choose_supervised(config: Sft) -> SupervisedAlgorithm:
    """The algorithm of a run's options.  Raises UserError for one that is out of range."""
    smoothing, z_loss, alpha = config.label_smoothing, config.z_loss, config.neftune_alpha
    if config.exact and (smoothing or z_loss):
        raise UserError(
            "--exact: --label-smoothing and --z-loss sum a vocabulary in an order that depends on "
            "the rows beside it; leave one out"
        )
    require("--label-smoothing", smoothing, 0 <= smoothing < 1, "a share in [0, 1)")
    require("--z-loss", z_loss, 0 <= z_loss < math.inf, "a number of 0 or more")
    require("--neftune-alpha", alpha, 0 <= alpha < math.inf, "a number of 0 or more")

    if config.sample_weights and config.dataset is None:
        raise UserError(
            "--sample-weights: expected a --dataset with a weight column, got none; "
            "give --dataset, or leave it out"
        )
    return SupervisedAlgorithm(label_smoothing=smoothing, z_loss=z_loss, neftune_alpha=alpha)
