"""From the options of `fastrl hybrid` to a row of HYBRIDS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastrl.algorithms.advantage import of_completions
from fastrl.algorithms.hybrid import HYBRIDS, HybridAlgorithm
from fastrl.algorithms.presets import columns as preset
from fastrl.config import Hybrid
from fastrl.errors import UserError, choose, require
from fastrl.methods.grpo.options import FAMILY, with_group_options

SOLVED, DEMO_REWARD, REJECTED_REWARD = 1.0, 1.0, 0.0  # unless given
IN_LOSS = ("gate", "sft_coef", "rl_coef", "mu", "mu_end", "mu_warmup", "mu_decay", "gamma")
"""Options that are parameters of a row's rule, or of its members' surrogate."""


def choose_mixture(config: Hybrid, rows: Mapping[str, HybridAlgorithm] = HYBRIDS) -> HybridAlgorithm:
    """The row of `rows`, with the run's own settings.  Raises UserError for options that do not go
    together.
    """
    row = _with_rl(choose(config.algorithm.name, rows, "--algorithm"), config)
    for name in IN_LOSS:
        value = config.algorithm.number(name)
        if value is not None:
            row = _with_parameter(row, name, float(value))

    policy = with_group_options(row.policy, config)
    if config.algorithm.text("group_statistics") == "own":
        assert policy.advantage is not None, "a row of groups has one"
        policy = replace(policy, advantage=of_completions(policy.advantage))
    return replace(row, policy=policy)


def _with_rl(row: HybridAlgorithm, config: Hybrid) -> HybridAlgorithm:
    """The row with the algorithm of --rl for the policy's own completions."""
    name, semantics = config.algorithm.text("rl"), config.semantics
    if name is None:
        if semantics != "paper":
            raise UserError(
                f"--semantics: {semantics} is a preset of a row of --rl; give --rl, or leave it out"
            )
        return row
    policy = replace(choose(name, FAMILY, "--rl"), **preset(semantics, name))
    return replace(row, policy=replace(policy, prepare=(*policy.prepare, *row.policy.prepare)))


def _with_parameter(row: HybridAlgorithm, name: str, value: float) -> HybridAlgorithm:
    if name in row.rule.params:
        return replace(row, rule=replace(row.rule, params={**row.rule.params, name: value}))
    assert row.member is not None, f"{name} is a parameter of the row's members"
    surrogate = row.member.surrogate.with_params(**{name: value})
    return replace(row, member=replace(row.member, surrogate=surrogate))


def check_mixture(config: Hybrid, row: HybridAlgorithm, *, turns: bool = False) -> None:
    """Refuse settings that have no meaning with demonstrations in the batch, or with pairs beside it."""
    temperature, combined = config.sampling.temperature, config.multi_objective_aggregation
    scored = "1, at which demonstrations and pairs are scored"
    require("--sampling.temperature", temperature, temperature == 1, scored)
    if row.others:
        correction = row.policy.correction
        drops = correction is not None and correction.drops
        anywhere = (
            f"one that truncates with --semantics {config.semantics}, whose masks drop what was not sampled"
        )
        require("--correction", config.correction, not drops, anywhere)
        unsolved = "0: it drops the unsolved prompts, which learn from what joins their group"
        require("--refill", config.refill, config.refill == 0, unsolved)
        require("--tail", config.tail, config.tail != "carry", "finish or cut")
        require(
            "--task", config.task, not turns, "a task of one turn, because demonstrations and pairs have one"
        )
    if row.member is not None:
        together = "sum_then_normalize: a member that was not sampled has one reward"
        require("--multi-objective-aggregation", combined, combined == "sum_then_normalize", together)
