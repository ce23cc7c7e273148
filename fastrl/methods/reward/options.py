"""From the options of `fastrl reward` to a row of REWARD_LOSSES."""

from __future__ import annotations

import math
from dataclasses import replace

from fastrl.algorithms.reward import REWARD_LOSSES, RewardLoss
from fastrl.config import Reward
from fastrl.errors import UserError, nearest


def choose_reward_loss(config: Reward) -> RewardLoss:
    """The table's row with the run's own centring.  Raises UserError for a name or a combination that does
    not exist.
    """
    if config.algorithm not in REWARD_LOSSES:
        near = nearest(config.algorithm, REWARD_LOSSES)
        raise UserError(
            f"--algorithm: expected one of {', '.join(REWARD_LOSSES)}; got {config.algorithm!r}{near}"
        )
    row = REWARD_LOSSES[config.algorithm]
    for option, value, fine, expected in (
        ("--center", config.center, 0 <= config.center < math.inf, "a number of 0 or more"),
        (
            "--center",
            config.center,
            config.center == 0 or row.compares,
            f"0 with {config.algorithm}, whose verdicts fix the rewards' zero",
        ),
        ("--group", config.group, config.group >= 2, "at least 2 completions of a prompt, to compare them"),
        ("--holdout", config.holdout, 0 <= config.holdout < 1, "a share of at least 0 and below 1"),
        (
            "--step-separator",
            config.step_separator,
            config.step_separator != "",
            "a text of at least one character",
        ),
        (
            "--exact",
            config.exact,
            not config.exact,
            "none: no log-probs are sampled here, whose equals they could be",
        ),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value!r}")
    return replace(row, center=config.center)
