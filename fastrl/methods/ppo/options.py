"""From the options of `fastrl ppo` to a row of PPO."""

from __future__ import annotations

import math
from dataclasses import replace

from fastrl.algorithms.ppo import KL_COEF, PPO, SEMANTICS, ActorCriticAlgorithm
from fastrl.algorithms.presets import KL
from fastrl.config import Ppo
from fastrl.errors import choose, require
from fastrl.methods.grpo.options import with_options


def choose_ppo(config: Ppo) -> ActorCriticAlgorithm:
    """The row, with the run's own settings.  Raises UserError for options that do not go together."""
    _check_advantages(config)
    _check_kl(config)
    _check_critic(config)
    row = choose(config.algorithm.name, PPO, "--algorithm")
    preset = choose(config.semantics, SEMANTICS, "--semantics")
    row = _with_critic(replace(row, **preset.row), config)

    coef = KL_COEF if config.kl_coef is None else config.kl_coef
    policy = replace(row.policy, **preset.policy)
    plain = replace(config, semantics="paper")  # the preset is in the row already
    if config.kl_in == "loss":
        policy = with_options(policy, replace(plain, kl_coef=coef))
        kl = None if policy.kl is None else _estimator(policy.kl, config)
        return replace(row, policy=replace(policy, kl=kl))

    policy = with_options(policy, replace(plain, kl=None, kl_coef=None))
    return replace(row, policy=policy, reward_kl=_estimator(config.kl or "k1", config), reward_kl_coef=coef)


def _estimator(name: str, config: Ppo) -> str:
    """The estimator that --semantics means by a name."""
    return KL.get(config.semantics, {}).get(name, name)


def _with_critic(row: ActorCriticAlgorithm, config: Ppo) -> ActorCriticAlgorithm:
    row = replace(
        row,
        gamma=config.gamma,
        whiten=config.whiten,
        critic=config.critic,
        critic_model=config.critic_model,
        critic_lr=config.critic_lr,
    )
    if config.lam is not None:
        row = replace(row, lam=config.lam)
    if config.vf_coef is not None:
        row = replace(row, vf_coef=config.vf_coef)
    if config.value_clip is not None:
        row = replace(row, value_clip=config.value_clip or math.inf)
    return row


def _check_advantages(config: Ppo) -> None:
    gamma, lam, penalty = config.gamma, config.lam, config.missing_eos_penalty
    require("--gamma", gamma, 0 <= gamma <= 1, "a discount in [0, 1]")
    require("--lam", lam, lam is None or 0 <= lam <= 1, "a number in [0, 1]")
    require("--missing-eos-penalty", penalty, math.isfinite(penalty), "a finite number")


def _check_kl(config: Ppo) -> None:
    coef, target, horizon = config.kl_coef, config.kl_target, config.kl_horizon
    require("--kl-coef", coef, coef is None or coef >= 0, "0 or more")
    require("--kl", config.kl, config.kl is None or coef != 0, "no estimator at --kl-coef 0")
    if target is not None:
        require("--kl-target", target, target > 0, "a positive number of nats")
        require("--kl-target", target, coef != 0, "none at --kl-coef 0, which stays 0")
        samples = config.prompts * config.group
        require("--kl-horizon", horizon, horizon >= samples, f"at least a step's {samples}")


def _check_critic(config: Ppo) -> None:
    separate, lr, coef, clip = (
        config.critic == "separate",
        config.critic_lr,
        config.vf_coef,
        config.value_clip,
    )
    own = lr is None and config.critic_model is None
    require(
        "--critic-lr, --critic-model",
        config.critic,
        separate or own,
        "--critic separate, which has an optimizer and weights of its own",
    )
    require("--critic-lr", lr, lr is None or 0 <= lr < math.inf, "0 or more")
    alone = "none with --critic separate, which has an optimizer of its own; see --critic-lr"
    require("--vf-coef", coef, coef is None or not separate, alone)
    require("--vf-coef", coef, coef is None or 0 <= coef < math.inf, "0 or more")
    require("--value-clip", clip, clip is None or clip >= 0, "a positive number, or 0 for none")
