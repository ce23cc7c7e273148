"""From the options of `fastrl hybrid` to a row of HYBRIDS or FUSIONS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Literal

from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.group_preference import GroupPreference, Listwise, OnlinePairs
from fastrl.algorithms.hybrid import HYBRIDS, HybridAlgorithm, OfflinePairs
from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.algorithms.schedule import Schedule
from fastrl.config import AlgorithmChoice, Dpo, Hybrid, Run
from fastrl.config.dpo import TRL_NAMES
from fastrl.errors import UserError, choose, require
from fastrl.methods.dpo.options import choose_preference
from fastrl.methods.hybrid.options import choose_mixture

ROWS: Mapping[str, HybridAlgorithm | GroupPreference] = HYBRIDS | FUSIONS
OF_POLICY_LOSS = (  # general options that only change a policy loss: refused for rows without one
    "kl",
    "kl_coef",
    "entropy_coef",
    "advantage",
    "scale_rewards",
    "correction",
    "correction_min",
    "correction_max",
    "off_policy_mask_threshold",
)


def choose_hybrid(config: Hybrid) -> HybridAlgorithm | GroupPreference:
    """The row of HYBRIDS or FUSIONS, with the run's own settings.  Raises UserError for options that do not
    go together.
    """
    row = choose(config.algorithm.name, ROWS, "--algorithm")
    if isinstance(row, GroupPreference):
        return _group_preference(row, config)

    with_policy = {name: other for name, other in ROWS.items() if isinstance(other, HybridAlgorithm)}
    chosen = choose_mixture(config, with_policy)
    if chosen.pairs is not None:
        return replace(chosen, pairs=_offline_pairs(chosen.pairs, config))
    return _with_members(chosen, config)


def _offline_pairs(pairs: OfflinePairs, config: Hybrid) -> OfflinePairs:
    """The loss of offline pairs, with its weight over the run."""
    given, default = config.algorithm, pairs.coef
    coef = Schedule(
        peak=given.number("pair_coef", default.peak),
        end=given.number("pair_coef_end", default.end),
        warmup=given.count("pair_warmup", default.warmup),
        decay=given.count("pair_decay", default.decay),
    )
    return OfflinePairs(_pair_loss(config), coef)


def _with_members(row: HybridAlgorithm, config: Hybrid) -> HybridAlgorithm:
    """The row with the completions of a pair that join its prompt's group."""
    if config.algorithm.text("members") != "chosen":
        return row
    if config.algorithm.number("rejected_reward") is not None:
        raise UserError(
            "--rejected-reward: expected --members both, "
            "which has rejected completions in the group; got chosen"
        )
    return replace(row, sides=1)


def _group_preference(row: GroupPreference, config: Hybrid) -> GroupPreference:
    name = config.algorithm.name
    anchor = config.algorithm.text("anchor")
    row = replace(row, group=config.group, anchor="old" if anchor == "old" else "start")
    row = _online(row, config) if isinstance(row.comparison, OnlinePairs) else _listwise(row, config)
    for option in OF_POLICY_LOSS:
        if getattr(config, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')}: expected none with {name}, whose loss compares completions, "
                f"got {getattr(config, option)}; leave it out"
            )
    combined = config.multi_objective_aggregation
    require("--group", config.group, config.group >= 2, "at least 2 completions of a prompt, to compare them")
    alone = "sum_then_normalize: completions are compared by one reward"
    require("--multi-objective-aggregation", combined, combined == "sum_then_normalize", alone)
    if config.semantics != "paper":
        raise UserError(f"--semantics: no other trainer has {name}; remove --semantics")
    return row


def _online(row: GroupPreference, config: Hybrid) -> GroupPreference:
    preference, default = _pair_loss(config), OnlinePairs()
    named = config.algorithm.text("preference")
    if preference.tail != 1.0:
        raise UserError(
            "--preference: expected a loss whose token weights do not depend on the other completion, "
            f"got {named}; take another, such as dpo"
        )
    if config.algorithm.text("anchor") is not None and not preference.reference:
        raise UserError(f"--anchor: {named} compares with no reference; leave it out")

    pairing = config.algorithm.text("pairing", default.pairing)
    gap = config.algorithm.number("gap", default.gap)
    return replace(row, preference=preference, comparison=OnlinePairs(pairing, gap))


def _listwise(row: GroupPreference, config: Hybrid) -> GroupPreference:
    beta = config.algorithm.number("beta", float(row.preference.params["beta"]))
    comparison = Listwise(config.algorithm.number("tau", Listwise().tau))
    return replace(row, preference=row.preference.with_params(beta=beta), comparison=comparison)


def _pair_loss(config: Hybrid) -> Preference:
    """The row of --preference with its options."""
    name = config.algorithm.text("preference", "dpo")
    if choose(TRL_NAMES.get(name, name), PREFERENCES, "--preference").paired:
        return choose_preference(offline(config), "--preference")
    paired = ", ".join(n for n, other in PREFERENCES.items() if other.paired)
    raise UserError(f"--preference: expected a loss of pairs ({paired}), got {name}")


def _reference(config: Hybrid) -> Literal["precomputed", "live"] | None:
    asked = config.algorithm.text("reference")
    if asked is None:
        return None
    return "live" if asked == "live" else "precomputed"


def offline(config: Hybrid) -> Dpo:
    """The `fastrl dpo` config that supplies the offline pairs, one batch per optimizer step."""
    shared = {f.name: getattr(config, f.name) for f in fields(Run)}
    dataset = config.algorithm.text("pair_dataset")
    if dataset is not None:
        shared |= {"dataset": dataset, "columns": ()}  # its columns have their own names
    shared["prompts"] = config.algorithm.count("pairs") or config.prompts
    shared["steps"] = config.steps * config.minibatches * config.epochs

    given = config.algorithm.options
    of_loss = {name: given[name] for name in ("beta", "nll_coef") if name in given}
    return Dpo(
        **shared,
        algorithm=AlgorithmChoice(config.algorithm.text("preference", "dpo"), of_loss),
        reference=_reference(config),
    )
