"""From the options of `fastrl reward` to a row of REWARD_LOSSES."""

from __future__ import annotations

from dataclasses import replace

from fastrl.algorithms.reward import REWARD_LOSSES, RewardLoss
from fastrl.config import Reward
from fastrl.errors import UserError, choose, require

STEP_SEPARATOR = "\n"  # unless given


def choose_reward_loss(config: Reward) -> RewardLoss:
    """The table's row with the run's own centring.  Raises UserError for an unknown row, or an option out of
    range.
    """
    row = choose(config.algorithm.name, REWARD_LOSSES, "--algorithm")
    group, holdout = config.group, config.holdout
    require("--group", group, group >= 2, "at least 2 completions of a prompt, to compare them")
    require("--holdout", holdout, 0 <= holdout < 1, "a share of at least 0 and below 1")
    if separator_of(config) == "":
        raise UserError("--step-separator: expected a text of at least one character, got ''")
    if config.exact:
        raise UserError("--exact: reward models sample nothing; remove the option")
    return replace(row, center=config.algorithm.number("center", 0.0))


def separator_of(config: Reward) -> str:
    """What ends a step of a completion."""
    return config.algorithm.text("step_separator", STEP_SEPARATOR)
