"""From a run's options to an `Algorithm`: the named row of ALGORITHMS, adjusted by --semantics and then by
the options that are given.

An option that would have no effect, or that contradicts the row, is refused here: if it were ignored, the run
would train another method than its user believes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.correction import CORRECTIONS
from fastrl.algorithms.objective import ALGORITHMS, Algorithm
from fastrl.algorithms.prepare import drop_stale, gamma_weight, geometric_mean
from fastrl.algorithms.presets import columns, estimator, settled
from fastrl.config import GroupRelative, OnPolicy
from fastrl.errors import UserError, choose, require
from fastrl.kernels.surrogates import name_of

SCALES = {"group": "std", "batch": "batch_std", "range": "range", "none": "none"}
"""TRL's names of --scale-rewards -> those of ops.group_advantage."""
FAMILY = {name: row for name, row in ALGORITHMS.items() if row.advantage is not None}
"""The rows that learn from groups of rewarded completions."""


def choose_algorithm(config: GroupRelative) -> Algorithm:
    """The row of FAMILY, with the run's own settings.  Raises UserError for options that do not go
    together.
    """
    name = config.algorithm.name
    row = choose(name, FAMILY, "--algorithm")
    return with_group_options(replace(row, **columns(config.semantics, name)), config)


def with_options(algorithm: Algorithm, config: OnPolicy) -> Algorithm:
    """The algorithm with the columns that the run's options change.  Raises UserError for options that do not
    go with it.
    """
    for change in (_with_kl, _with_bounds, _with_correction, _with_stale_mask):
        algorithm = change(algorithm, config)
    return algorithm


def with_group_options(algorithm: Algorithm, config: GroupRelative) -> Algorithm:
    """The same, with the options of an advantage that compares a prompt's completions."""
    return _with_advantage(with_options(algorithm, config), config)


def _with_kl(algorithm: Algorithm, config: OnPolicy) -> Algorithm:
    coef, entropy_coef = config.kl_coef, config.entropy_coef
    if coef is not None:
        if not 0 <= coef < math.inf:
            raise UserError(
                "--kl-coef: expected a number of 0 or more; below 0 the policy would be driven away from the "
                f"reference; got {coef:g}"
            )
        algorithm = replace(algorithm, kl_coef=coef)
    if entropy_coef is not None:
        require("--entropy-coef", entropy_coef, math.isfinite(entropy_coef), "a finite number")
        algorithm = replace(algorithm, entropy_coef=entropy_coef)
    if config.kl is not None:
        algorithm = replace(algorithm, kl=config.kl)

    if not algorithm.kl_coef:
        if config.kl is not None:
            raise UserError(
                f"--kl: {config.kl} has no effect at --kl-coef 0; give --kl-coef, or leave --kl out"
            )
        return algorithm
    return replace(algorithm, kl=estimator(config.semantics, algorithm.kl or "k3"))


def _with_advantage(algorithm: Algorithm, config: GroupRelative) -> Algorithm:
    if config.advantage is not None:
        algorithm = replace(algorithm, advantage=choose(config.advantage, ADVANTAGES, "--advantage"))
    advantage = algorithm.advantage
    assert advantage is not None, "a row of groups has one"
    if config.scale_rewards is not None:
        if "scale" not in advantage.params:
            having = ", ".join(name for name, other in ADVANTAGES.items() if "scale" in other.params)
            raise UserError(
                f"--scale-rewards: the advantage of {config.algorithm.name} has no scale; "
                f"take an --advantage that has one: {having}"
            )
        advantage = advantage.with_params(scale=SCALES[config.scale_rewards])

    k = config.algorithm.count("pass_k")
    if k is not None:
        if not 2 <= k <= config.group:
            raise UserError(
                f"--pass-k: expected 2 to --group ({config.group}), got {k}; for 1 take --algorithm rloo"
            )
        if "k" not in advantage.params:
            raise UserError("--pass-k: only --advantage max_at_k has it; leave --pass-k or --advantage out")
        advantage = advantage.with_params(k=k)
    return replace(algorithm, advantage=advantage)


def _with_bounds(algorithm: Algorithm, config: OnPolicy) -> Algorithm:
    """Clip bounds from --epsilon, --epsilon-high and --delta.

    --epsilon alone sets both bounds, as in TRL.  CISPO has an upper bound only, --epsilon-high, given as the
    ratio itself rather than as a distance from 1.  GMPO's bounds are those of log-ratios, as in its paper,
    TRL and verl.
    """
    low, high = config.algorithm.number("epsilon"), config.algorithm.number("epsilon_high")
    cap, surrogate = config.algorithm.number("delta"), algorithm.surrogate
    name = config.algorithm.name
    if low is not None and name_of(surrogate) == "cispo":
        raise UserError(f"--epsilon: {name} bounds its weight from above only; give --epsilon-high")
    if high is None and "cap" in surrogate.params:
        high = low

    logarithmic = geometric_mean in algorithm.prepare  # GMPO, which has no --delta
    changes: dict[str, float] = {}
    for option, bound, value in (
        ("--epsilon", "low", low),
        ("--epsilon-high", "high", high),
        ("--delta", "cap", cap),
    ):
        if value is None:
            continue
        if bound not in surrogate.params or (logarithmic and bound == "cap"):
            raise UserError(
                f"{option}: {name} has no such bound; take an algorithm that clips (grpo, dapo, gspo, ...)"
            )
        changes[bound] = value
    if logarithmic:  # from bounds of the log-ratio to distances of the ratio from 1
        changes = {key: abs(math.expm1(-x if key == "low" else x)) for key, x in changes.items()}

    try:
        bounded = surrogate.with_params(**changes) if changes else surrogate
    except ValueError as error:
        raise UserError(f"--delta: {error}; give a larger one, or none") from error
    return replace(algorithm, surrogate=bounded)


def _with_correction(algorithm: Algorithm, config: OnPolicy) -> Algorithm:
    low, high = config.correction_min, config.correction_max
    if config.correction is None:
        if low is not None or high is not None:
            raise UserError("--correction-min, --correction-max: expected a --correction to bound, got none")
        return algorithm

    correction = choose(config.correction, CORRECTIONS, "--correction")
    low = correction.low if low is None else low
    high = correction.high if high is None else high
    correction = settled(config.semantics, replace(correction, low=low, high=high))
    if gamma_weight in algorithm.prepare and correction.level != "token":
        raise UserError(
            f"--correction: {config.algorithm.name} sums the corrections of a sequence's tokens; "
            "take token_truncate or token_mask"
        )
    return replace(algorithm, correction=correction)


def _with_stale_mask(algorithm: Algorithm, config: OnPolicy) -> Algorithm:
    threshold = config.off_policy_mask_threshold
    if threshold is None:
        return algorithm
    positive = "a positive number of nats per token"
    require("--off-policy-mask-threshold", threshold, threshold > 0, positive)
    return replace(algorithm, prepare=(*algorithm.prepare, partial(drop_stale, threshold=threshold)))


def check_rollouts(config: OnPolicy, *, least: int = 1, processes: int = 1, turns: bool = False) -> None:
    """Refuse rollout options that are out of range or do not go together.

    least      completions of a prompt that the advantage needs
    processes  how many train together
    turns      whether the task is a conversation of several turns
    """
    if config.sampling.temperature == 0:
        raise UserError(
            "--sampling.temperature: expected a positive number, got 0; "
            "greedy samples have no old log-prob to train on"
        )
    group = config.group
    require("--group", group, group >= least, f"at least {least} completions of a prompt, to compare them")

    minibatches, prompts = config.minibatches, config.prompts
    require("--minibatches", minibatches, 1 <= minibatches <= prompts, f"1 to --prompts ({prompts})")
    require("--epochs", config.epochs, config.epochs >= 1, "at least 1")

    refill = config.refill
    require("--refill", refill, refill >= 0, "a number of rounds of 0 or more")
    alone = "0 with --group 1, whose groups never have two rewards"
    require("--refill", refill, refill == 0 or group >= 2, alone)

    buffer, longest = config.overlong_buffer, config.max_new_tokens
    require("--overlong-buffer", buffer, 0 <= buffer <= longest, f"0 to --max-new-tokens ({longest})")
    _check_tail(config, processes, turns)


def _check_tail(config: OnPolicy, processes: int, turns: bool) -> None:
    tail, share = config.tail, config.tail_share
    require("--tail-share", share, 0 < share < 1, "a fraction in (0, 1)")
    if tail == "carry":
        require("--tail", tail, processes == 1, "finish or cut with several processes")
        require("--tail", tail, not turns, "finish or cut with a task of several turns")
        full = "finish or cut with --refill, which fills the batch anyway"
        require("--tail", tail, config.refill == 0, full)
