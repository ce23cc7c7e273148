"""From the options of `fastrl ppo` to a row of PPO."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastrl.algorithms.ppo import KL_COEF, PPO, SEMANTICS, ActorCriticAlgorithm
from fastrl.algorithms.presets import KL
from fastrl.config import Ppo
from fastrl.errors import UserError
from fastrl.methods.grpo.options import choose_algorithm


def choose_ppo(config: Ppo) -> ActorCriticAlgorithm:
    """The row, with the run's own settings.  Raises UserError for options that do not go together."""
    _check(config)
    if config.algorithm not in PPO:
        raise UserError(f"--algorithm: expected one of {', '.join(PPO)}; got {config.algorithm!r}")
    if config.semantics not in SEMANTICS:
        raise UserError(f"--semantics: expected one of {', '.join(SEMANTICS)}; got {config.semantics!r}")
    preset = SEMANTICS[config.semantics]
    coef = KL_COEF if config.kl_coef is None else config.kl_coef
    inside = config.kl_in == "reward"
    row = replace(PPO[config.algorithm], **preset.row)
    table = {config.algorithm: replace(row.policy, **preset.policy)}
    family = replace(
        config, semantics="paper", kl=None if inside else config.kl, kl_coef=None if inside else coef
    )
    policy = choose_algorithm(family, table)
    estimator = (config.kl or "k1") if inside else policy.kl
    estimator = KL.get(config.semantics, {}).get(estimator or "", estimator)
    given: dict[str, Any] = {"reward_kl": estimator, "reward_kl_coef": coef} if inside else {}
    given["policy"] = policy if inside else replace(policy, kl=estimator)
    given |= {
        "gamma": config.gamma,
        "whiten": config.whiten,
        "critic": config.critic,
        "critic_model": config.critic_model,
    }
    given |= {"critic_lr": config.critic_lr}
    given |= {} if config.lam is None else {"lam": config.lam}
    given |= {} if config.vf_coef is None else {"vf_coef": config.vf_coef}
    given |= {} if config.value_clip is None else {"value_clip": config.value_clip or math.inf}
    return replace(row, **given)


def _check(config: Ppo) -> None:
    for option in ("advantage", "scale_rewards", "pass_k"):
        if getattr(config, option) is not None:
            spelt = option.replace("_", "-")
            raise UserError(
                f"--{spelt}: PPO's advantages come from its critic; leave it out, or run fastrl grpo"
            )
    several, own, coef = config.multi_objective_aggregation, config.critic == "separate", config.kl_coef
    tied, alone = config.critic_lr is None and config.critic_model is None, config.vf_coef is None
    samples = config.prompts * config.group
    for name, value, fine, expected in (
        (
            "--multi-objective-aggregation",
            several,
            several == "sum_then_normalize",
            "sum_then_normalize, as there are no groups",
        ),
        ("--gamma", config.gamma, 0 <= config.gamma <= 1, "a discount in [0, 1]"),
        ("--lam", config.lam, config.lam is None or 0 <= config.lam <= 1, "a number in [0, 1]"),
        ("--kl-coef", coef, coef is None or coef >= 0, "0 or more"),
        ("--kl", config.kl, config.kl is None or coef != 0, "no estimator at --kl-coef 0"),
        (
            "--kl-target",
            config.kl_target,
            config.kl_target is None or config.kl_target > 0,
            "a positive number of nats",
        ),
        (
            "--kl-target",
            config.kl_target,
            config.kl_target is None or coef != 0,
            "none at --kl-coef 0, which no factor moves",
        ),
        (
            "--kl-horizon",
            config.kl_horizon,
            config.kl_target is None or config.kl_horizon >= samples,
            f"at least a step's {samples}",
        ),
        (
            "--critic-lr, --critic-model",
            config.critic,
            own or tied,
            "--critic separate, which has an optimizer and weights of its own",
        ),
        (
            "--critic-lr",
            config.critic_lr,
            config.critic_lr is None or 0 <= config.critic_lr < math.inf,
            "0 or more",
        ),
        (
            "--vf-coef",
            config.vf_coef,
            alone or not own,
            "none with --critic separate, whose optimizer is its own; see --critic-lr",
        ),
        ("--vf-coef", config.vf_coef, alone or 0 <= (config.vf_coef or 0) < math.inf, "0 or more"),
        (
            "--missing-eos-penalty",
            config.missing_eos_penalty,
            math.isfinite(config.missing_eos_penalty),
            "a finite number",
        ),
        (
            "--value-clip",
            config.value_clip,
            (config.value_clip or 0) >= 0,
            "a positive number, or 0 for none",
        ),
    ):
        if not fine:
            raise UserError(f"{name}: expected {expected}, got {value}")
