"""From the options of `fastrl hybrid` to a row of HYBRIDS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fastrl.algorithms.advantage import of_completions
from fastrl.algorithms.hybrid import HYBRIDS, HybridAlgorithm
from fastrl.algorithms.objective import ALGORITHMS
from fastrl.algorithms.presets import columns as preset
from fastrl.config import Hybrid
from fastrl.errors import UserError
from fastrl.methods.grpo.options import with_options

RANGES = {  # option -> what it may be, and in words
    "gate": (0.0, 1.0, "a share of completions in [0, 1]"),
    "sft_coef": (0.0, math.inf, "a number of 0 or more"),
    "rl_coef": (0.0, math.inf, "a number of 0 or more"),
    "mu": (0.0, 1.0, "a number in [0, 1]"),
    "mu_end": (0.0, 1.0, "a number in [0, 1]"),
    "mu_warmup": (0, math.inf, "steps, 0 or more"),
    "mu_decay": (0, math.inf, "steps, 0 or more"),
    "gamma": (1e-8, math.inf, "a positive number"),
}


def choose_hybrid(config: Hybrid, rows: Mapping[str, HybridAlgorithm] = HYBRIDS) -> HybridAlgorithm:
    """The row of `rows`, with the run's own settings where it has them.  Raises UserError for options that do
    not go together.
    """
    if config.algorithm not in rows:
        raise UserError(f"--algorithm: expected one of {', '.join(rows)}; got {config.algorithm!r}")
    row = _base(rows[config.algorithm], config)
    for name, (low, high, expected) in RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
        row = _with(row, name, float(value), config.algorithm, rows)
    changed = replace(row, policy=with_options(row.policy, config))
    if config.group_statistics == "union":
        return changed
    if row.member is None or row.sides != 1:
        fine = ", ".join(name for name, other in HYBRIDS.items() if other.member)
        raise UserError(
            f"--group-statistics: {config.algorithm} has no demonstration in a group; "
            f"take an --algorithm that has: {fine}"
        )
    assert changed.policy.advantage is not None
    return replace(
        changed, policy=replace(changed.policy, advantage=of_completions(changed.policy.advantage))
    )


def _base(row: HybridAlgorithm, config: Hybrid) -> HybridAlgorithm:
    """The row with the algorithm of `--rl` for the policy's own completions."""
    if config.rl is None:
        if config.semantics != "paper":
            raise UserError(
                f"--semantics: {config.semantics} is of a row of --rl; give --rl, or leave --semantics out"
            )
        return row
    rows = {name: other for name, other in ALGORITHMS.items() if other.advantage is not None}
    if config.rl not in rows:
        raise UserError(f"--rl: expected one of {', '.join(rows)}; got {config.rl!r}")
    base = replace(rows[config.rl], **preset(config.semantics, config.rl))
    return replace(row, policy=replace(base, prepare=(*base.prepare, *row.policy.prepare)))


def _with(
    row: HybridAlgorithm, name: str, value: float, algorithm: str, rows: Mapping[str, HybridAlgorithm]
) -> HybridAlgorithm:
    if name in row.rule.params:
        return replace(row, rule=replace(row.rule, params={**row.rule.params, name: value}))
    if row.member is not None and name in row.member.surrogate.params:
        return replace(
            row, member=replace(row.member, surrogate=row.member.surrogate.with_params(**{name: value}))
        )
    fine = [
        k
        for k, o in rows.items()
        if name in o.rule.params or (o.member and name in o.member.surrogate.params)
    ]
    raise UserError(
        f"--{name.replace('_', '-')}: {algorithm} has no such setting; take an --algorithm that has: "
        f"{', '.join(fine)}"
    )


def check_mixture(config: Hybrid, row: HybridAlgorithm, *, turns: bool = False) -> None:
    """Refuse settings that have no meaning with demonstrations in the batch, or with pairs beside it."""
    apart, alone = "multi_objective_aggregation", not row.others
    together = config.multi_objective_aggregation == "sum_then_normalize" or row.member is None
    for name, value, fine, expected in (
        (
            "sampling.temperature",
            config.sampling.temperature,
            config.sampling.temperature == 1,
            "1, at which demonstrations and pairs are scored",
        ),
        (
            "refill",
            config.refill,
            alone or config.refill == 0,
            "0: prompts that nobody solves are what demonstrations are for",
        ),
        ("tail", config.tail, alone or config.tail != "carry", "finish or cut"),
        ("task", config.task, alone or not turns, "a task of one turn, as demonstrations are"),
        ("demo_reward", config.demo_reward, math.isfinite(config.demo_reward), "a finite number"),
        (
            "demo_reward",
            config.demo_reward,
            row.member is not None or config.demo_reward == 1,
            "1: no demonstration has a reward here",
        ),
        ("solved", config.solved, not math.isnan(config.solved), "a reward"),
        (
            "solved",
            config.solved,
            not alone or config.solved == 1,
            "1: this row does not ask which prompts are solved",
        ),
        (apart, getattr(config, apart), together, "sum_then_normalize: a demonstration has one reward"),
    ):
        if not fine:
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
