"""From a run's options to a row: the table's, as a preset has it, with the columns the user changed.

Options that have nothing to act on, or contradict the row, are refused here: an option that is silently
ignored trains another method than its user believes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastrl.algorithms.advantage import ADVANTAGES
from fastrl.algorithms.correction import CORRECTIONS
from fastrl.algorithms.objective import ALGORITHMS, Algorithm
from fastrl.algorithms.prepare import drop_stale, gamma_weight, geometric_mean
from fastrl.algorithms.presets import columns, estimator
from fastrl.config import Grpo, Run
from fastrl.errors import UserError, nearest
from fastrl.kernels.surrogates import name_of

# TRL's names -> ops.group_advantage's
SCALES = {
    "group": "std",
    "batch": "batch_std",
    "range": "range",
    "none": "none",
}


def choose_algorithm(config: Run, rows: Mapping[str, Algorithm] | None = None) -> Algorithm:
    """The row of `rows` (default: the family), with the run's own settings where it has them.

    Raises UserError for options that do not go together.
    """
    if not isinstance(config, Grpo):
        return ALGORITHMS["sft"]
    rows = rows or {k: v for k, v in ALGORITHMS.items() if v.advantage is not None}
    if config.algorithm not in rows:
        near = nearest(config.algorithm, rows)
        raise UserError(f"--algorithm: expected one of {', '.join(rows)}; got {config.algorithm!r}{near}")
    return with_options(
        replace(rows[config.algorithm], **columns(config.semantics, config.algorithm)), config
    )


def with_options(row: Algorithm, config: Grpo) -> Algorithm:
    """The row with the columns that the run's options change.  Raises UserError for options that do not go
    with it.
    """
    for change in (_kl, _advantage, _bounds, _correction, _stale):
        row = change(row, config)
    return row


def _kl(row: Algorithm, config: Grpo) -> Algorithm:
    given = {k: v for k in ("kl", "kl_coef", "entropy_coef") if (v := getattr(config, k)) is not None}
    for option, value, low, expected in (
        (
            "--kl-coef",
            config.kl_coef,
            0.0,
            "a number of 0 or more; below 0 the policy would be driven away from the reference",
        ),
        ("--entropy-coef", config.entropy_coef, -math.inf, "a finite number"),
    ):
        if value is not None and not (math.isfinite(value) and value >= low):
            raise UserError(f"{option}: expected {expected}; got {value:g}")
    row = replace(row, **given)
    if config.kl is not None and not row.kl_coef:
        raise UserError(f"--kl: {config.kl} has no effect at --kl-coef 0; give --kl-coef, or leave --kl out")
    row = replace(row, kl="k3") if row.kl_coef and row.kl is None else row
    return replace(row, kl=estimator(config.semantics, row.kl)) if row.kl_coef and row.kl else row


def _advantage(row: Algorithm, config: Grpo) -> Algorithm:
    if config.advantage is not None:
        if config.advantage not in ADVANTAGES:
            near = nearest(config.advantage, ADVANTAGES)
            raise UserError(
                f"--advantage: expected one of {', '.join(ADVANTAGES)}; got {config.advantage!r}{near}"
            )
        row = replace(row, advantage=ADVANTAGES[config.advantage])
    if config.scale_rewards is not None:
        row = _with(row, "--scale-rewards", config, scale=SCALES[config.scale_rewards])
    if config.pass_k is not None:
        if not 2 <= config.pass_k <= config.group:
            raise UserError(
                f"--pass-k: expected 2 to --group ({config.group}), got {config.pass_k}; "
                "for 1 take --algorithm rloo"
            )
        row = _with(row, "--pass-k", config, k=config.pass_k)
    return row


def _bounds(row: Algorithm, config: Grpo) -> Algorithm:
    """--epsilon alone sets both bounds, as in TRL; for CISPO --epsilon-high is the absolute upper one, and
    there is no other.

    GMPO's are sizes of log-ratios, as its paper, TRL and verl have them.
    """
    high = (
        config.epsilon
        if config.epsilon_high is None and "cap" in row.surrogate.params
        else config.epsilon_high
    )
    given = {
        "low": (config.epsilon, "--epsilon"),
        "high": (high, "--epsilon-high"),
        "cap": (config.delta, "--delta"),
    }
    if config.epsilon is not None and name_of(row.surrogate) == "cispo":
        raise UserError(
            f"--epsilon: {config.algorithm} bounds its weight from above only; give --epsilon-high"
        )
    changes = {name: value for name, (value, _) in given.items() if value is not None}
    logarithmic = geometric_mean in row.prepare  # which knows two bounds
    known = row.surrogate.params.keys() - ({"cap"} if logarithmic else set())
    for name in changes:
        if name not in known:
            raise UserError(
                f"{given[name][1]}: {config.algorithm} has no such bound; "
                "take an algorithm that clips (grpo, dapo, gspo, ...)"
            )
        if not changes[name] > 0:
            raise UserError(f"{given[name][1]}: expected a positive number, got {changes[name]:g}")
    if logarithmic:
        changes = {name: abs(math.expm1(-x if name == "low" else x)) for name, x in changes.items()}
    try:
        return replace(row, surrogate=row.surrogate.with_params(**changes)) if changes else row
    except ValueError as error:
        raise UserError(f"--delta: {error}; give a larger one, or none") from error


def _correction(row: Algorithm, config: Grpo) -> Algorithm:
    bounds = {"low": config.correction_min, "high": config.correction_max}
    given: dict[str, Any] = {k: v for k, v in bounds.items() if v is not None}
    if config.correction is None:
        if given:
            raise UserError("--correction-min, --correction-max: expected a --correction to bound, got none")
        return row
    if config.correction not in CORRECTIONS:
        raise UserError(f"--correction: expected one of {', '.join(CORRECTIONS)}; got {config.correction!r}")
    correction = replace(CORRECTIONS[config.correction], **given)
    if gamma_weight in row.prepare and correction.level != "token":
        raise UserError(
            f"--correction: {config.algorithm} sums the corrections of a sequence's tokens; "
            "take token_truncate or token_mask"
        )
    return replace(row, correction=correction)


def _stale(row: Algorithm, config: Grpo) -> Algorithm:
    threshold = config.off_policy_mask_threshold
    if threshold is None:
        return row
    if not threshold > 0:
        raise UserError(
            f"--off-policy-mask-threshold: expected a positive number of nats per token, got {threshold:g}"
        )
    return replace(row, prepare=(*row.prepare, partial(drop_stale, threshold=threshold)))


def _with(row: Algorithm, option: str, config: Grpo, **params: Any) -> Algorithm:
    """The row with parameters of its advantage changed."""
    assert row.advantage is not None
    (name,) = params
    if name not in row.advantage.params:
        fine = ", ".join(key for key, other in ADVANTAGES.items() if name in other.params)
        raise UserError(
            f"{option}: the advantage of {config.algorithm} has no {name}; "
            f"take an --advantage that has: {fine}"
        )
    return replace(row, advantage=row.advantage.with_params(**params))


def check_rollouts(config: Grpo, *, least: int = 1, processes: int = 1, turns: bool = False) -> None:
    """Refuse settings under which the recorded log-prob would not be the policy's, or there is nothing to
    train on.

    least  completions of a prompt that the algorithm needs
    """
    if config.sampling.temperature == 0:
        raise UserError(
            "--sampling.temperature: expected a positive number, got 0; "
            "greedy samples have no old log-prob to train on"
        )
    buffer = config.overlong_buffer
    for option, value, fine, expected in (
        (
            "--group",
            config.group,
            config.group >= least,
            f"at least {least} completions of a prompt, to compare them",
        ),
        (
            "--minibatches",
            config.minibatches,
            1 <= config.minibatches <= config.prompts,
            f"1 to --prompts ({config.prompts})",
        ),
        ("--epochs", config.epochs, config.epochs >= 1, "at least 1"),
        ("--refill", config.refill, config.refill >= 0, "a number of rounds of 0 or more"),
        (
            "--refill",
            config.refill,
            config.refill == 0 or config.group >= 2,
            "0 with --group 1, whose groups never have two rewards",
        ),
        (
            "--tail",
            config.tail,
            config.tail != "carry" or processes == 1,
            "finish or cut with several processes",
        ),
        (
            "--tail",
            config.tail,
            config.tail != "carry" or not turns,
            "finish or cut with a task of several turns",
        ),
        (
            "--tail",
            config.tail,
            config.tail != "carry" or config.refill == 0,
            "finish or cut with --refill, which fills the batch anyway",
        ),
        ("--tail-share", config.tail_share, 0 < config.tail_share < 1, "a fraction in (0, 1)"),
        (
            "--overlong-buffer",
            buffer,
            0 <= buffer <= config.max_new_tokens,
            f"0 to --max-new-tokens ({config.max_new_tokens})",
        ),
    ):
        if not fine:
            raise UserError(f"{option}: expected {expected}, got {value}")
