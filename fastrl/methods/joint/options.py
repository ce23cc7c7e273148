"""From the options of `fastrl joint` to a row of the family with its reward model."""

from __future__ import annotations

import math
from dataclasses import replace

from fastrl.algorithms.joint import JointAlgorithm
from fastrl.algorithms.reward import REWARD_LOSSES
from fastrl.config import Joint
from fastrl.errors import UserError, nearest
from fastrl.methods.grpo.options import choose_algorithm


def choose_joint(config: Joint) -> JointAlgorithm:
    """The family's row with the reward model's part.  Raises UserError for options that do not go
    together.
    """
    rows = [name for name, row in REWARD_LOSSES.items() if row.compares]
    if config.reward_loss not in rows:
        got = f"{config.reward_loss!r}{nearest(config.reward_loss, rows)}"
        raise UserError(
            f"--reward-loss: expected one that compares completions, {' or '.join(rows)}; got {got}"
        )
    base = choose_algorithm(config)
    assert base.advantage is not None
    share, compared = config.offline_share, config.group * config.max_new_tokens
    by = "algorithm" if config.advantage is None else "advantage"
    for name, fine, expected in (
        ("group", config.group >= 2, "at least 2 completions of a prompt, to compare them"),
        ("center", 0 <= config.center < math.inf, "a number of 0 or more"),
        ("reward_lr", config.reward_lr is None or 0 <= config.reward_lr < math.inf, "a number of 0 or more"),
        ("reward_every", config.reward_every >= 1, "at least 1 step"),
        ("reward_epochs", config.reward_epochs >= 1, "at least 1"),
        ("calibration", config.calibration >= 2, "at least 2 completions, to have a deviation"),
        ("offline_share", 0 <= share < 1, "a share of at least 0 and below 1"),
        ("offline", config.offline is None or share > 0, "none at --offline-share 0; give a share"),
        ("refill", config.refill == 0, "0: a reward model hardly ever gives a group equal rewards"),
        (by, base.advantage.signed, "one that takes rewards below 0, as standardised ones are (not max_rl)"),
        (
            "micro_tokens",
            config.micro_tokens >= compared,
            f"--group x --max-new-tokens ({compared}) or more, to compare a group in one pass",
        ),
    ):
        if not fine:
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}; got {getattr(config, name)}")
    return JointAlgorithm(
        policy=base,
        reward_model=config.reward_model or config.model,
        seed=config.seed,
        reward_loss=replace(REWARD_LOSSES[config.reward_loss], center=config.center),
        reward_lr=config.reward_lr,
        reward_epochs=config.reward_epochs,
    )
