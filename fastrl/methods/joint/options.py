"""From the options of `fastrl joint` to its algorithm."""

from __future__ import annotations

import math
from dataclasses import replace

from fastrl.algorithms.joint import JointAlgorithm
from fastrl.algorithms.objective import Algorithm
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config import Joint
from fastrl.errors import UserError, nearest, require
from fastrl.methods.grpo.options import choose_algorithm


def choose_joint(config: Joint) -> JointAlgorithm:
    """The policy's algorithm and the reward model's loss.  Raises UserError for options that do not go
    together.
    """
    rows = [name for name, row in REWARD_LOSSES.items() if row.compares]
    if config.reward_loss not in rows:
        got = f"{config.reward_loss!r}{nearest(config.reward_loss, rows)}"
        raise UserError(
            f"--reward-loss: expected one that compares completions, {' or '.join(rows)}; got {got}"
        )
    policy = choose_algorithm(config)
    _check_reward_model(config)
    _check_policy(config, policy)
    return JointAlgorithm(
        policy=policy,
        reward_model=config.reward_model or config.model,
        seed=config.seed,
        reward_loss=replace(REWARD_LOSSES[config.reward_loss], center=config.center),
        reward_lr=config.reward_lr,
        reward_epochs=config.reward_epochs,
    )


def _check_policy(config: Joint, policy: Algorithm) -> None:
    assert policy.advantage is not None, "choose_algorithm() takes rows of groups only"
    option, name = "--advantage", config.advantage
    if name is None:
        option, name = "--algorithm", config.algorithm.name
    signed = "one that takes rewards below 0, as standardised ones are (not max_rl)"
    require(option, name, policy.advantage.signed, signed)

    compared, budget = config.group * config.max_new_tokens, config.micro_tokens
    whole = f"--group x --max-new-tokens ({compared}) or more, to compare a group in one pass"
    require("--micro-tokens", budget, budget >= compared, whole)


def _check_reward_model(config: Joint) -> None:
    group, center, lr = config.group, config.center, config.reward_lr
    require("--group", group, group >= 2, "at least 2 completions of a prompt, to compare them")
    require("--center", center, 0 <= center < math.inf, "a number of 0 or more")
    require("--reward-lr", lr, lr is None or 0 <= lr < math.inf, "a number of 0 or more")

    every, epochs, calibration = config.reward_every, config.reward_epochs, config.calibration
    require("--reward-every", every, every >= 1, "at least 1 step")
    require("--reward-epochs", epochs, epochs >= 1, "at least 1")
    require("--calibration", calibration, calibration >= 2, "at least 2 completions, to have a deviation")

    share, offline = config.offline_share, config.offline
    require("--offline-share", share, 0 <= share < 1, "a share of at least 0 and below 1")
    require("--offline", offline, offline is None or share > 0, "none at --offline-share 0 (give a share)")
