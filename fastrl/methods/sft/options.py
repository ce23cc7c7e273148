"""From the options of `fastrl sft` to its row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrl.algorithms import ALGORITHMS, Algorithm
from fastrl.algorithms.objective import HoldsPolicy
from fastrl.config import Sft
from fastrl.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedAlgorithm(HoldsPolicy):
    """Cross-entropy with the options of `fastrl.config.Sft`.

    policy  the loss of supervised tokens
    seed    of the noise on the embeddings
    """

    policy: Algorithm = ALGORITHMS["sft"]
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune_alpha: float = 0.0
    seed: int = 0


def choose_supervised(config: Sft) -> SupervisedAlgorithm:
    """The row of a run's options.  Raises UserError for one that is out of range."""
    if config.exact and (config.label_smoothing or config.z_loss):
        raise UserError(
            "--exact: --label-smoothing and --z-loss sum a vocabulary in an order that depends on "
            "the rows beside it; leave one out"
        )
    for option, value, fine, expected in (
        ("--label-smoothing", config.label_smoothing, 0 <= config.label_smoothing < 1, "a share in [0, 1)"),
        ("--z-loss", config.z_loss, 0 <= config.z_loss < math.inf, "a number of 0 or more"),
        (
            "--neftune-alpha",
            config.neftune_alpha,
            0 <= config.neftune_alpha < math.inf,
            "a number of 0 or more",
        ),
        (
            "--sample-weights",
            config.sample_weights,
            config.dataset is not None or not config.sample_weights,
            "a --dataset with weights",
        ),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value}")
    return SupervisedAlgorithm(
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        neftune_alpha=config.neftune_alpha,
        seed=config.seed,
    )
