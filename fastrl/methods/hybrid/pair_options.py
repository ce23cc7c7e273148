"""From the options of `fastrl hybrid` to a row of HYBRIDS or FUSIONS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.group_preference import GroupPreference, Listwise, OnlinePairs
from fastrl.algorithms.hybrid import HYBRIDS, HybridAlgorithm, OfflinePairs
from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.config import Dpo, Hybrid, Run
from fastrl.errors import UserError, nearest
from fastrl.methods.dpo.options import choose_preference
from fastrl.methods.hybrid.options import RANGES as HYBRID_RANGES
from fastrl.methods.hybrid.options import choose_hybrid

_MIXED: dict[str, HybridAlgorithm] = HYBRIDS | {
    name: row for name, row in FUSIONS.items() if isinstance(row, HybridAlgorithm)
}


def _rows(kind: type, fits: Callable[[Any], bool] = lambda row: True) -> tuple[str, ...]:
    return tuple(name for name, row in FUSIONS.items() if isinstance(row, kind) and fits(row))


_PAIRS = _rows(HybridAlgorithm, lambda row: row.pairs is not None)


_ONLINE = _rows(GroupPreference, lambda row: isinstance(row.comparison, OnlinePairs))


_LISTS = _rows(GroupPreference, lambda row: isinstance(row.comparison, Listwise))


_MEMBERS = _rows(HybridAlgorithm, lambda row: row.sides == 2)


Check = tuple[tuple[str, ...], Callable[[Any], bool], str]


_ANY: tuple[Callable[[Any], bool], str] = (lambda x: True, "")  # values are checked where they are used


_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x < math.inf, "a number of 0 or more")


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda x: 0 < x < math.inf, "a positive number")


_COUNT: tuple[Callable[[Any], bool], str] = (lambda x: x >= 1, "at least 1")


_STEPS: tuple[Callable[[Any], bool], str] = (lambda x: x >= 0, "steps, 0 or more")


OPTIONS: dict[str, Check] = {  # option -> the rows that have it, what it may be, and in words
    "preference": ((*_PAIRS, *_ONLINE), *_ANY),
    "beta": ((*_PAIRS, *_ONLINE, *_LISTS), *_POSITIVE),
    "nll_coef": ((*_PAIRS, *_ONLINE), *_NOT_NEGATIVE),
    "reference": (_PAIRS, *_ANY),
    "pair_dataset": (_PAIRS, *_ANY),
    "pairs": (_PAIRS, *_COUNT),
    "pair_coef": (_PAIRS, *_NOT_NEGATIVE),
    "pair_coef_end": (_PAIRS, *_NOT_NEGATIVE),
    "pair_warmup": (_PAIRS, *_STEPS),
    "pair_decay": (_PAIRS, *_STEPS),
    "norms_every": (_PAIRS, *_STEPS),
    "members": (_MEMBERS, *_ANY),
    "rejected_reward": (_MEMBERS, math.isfinite, "a finite number"),
    "pairing": (_ONLINE, *_ANY),
    "gap": (_ONLINE, *_NOT_NEGATIVE),
    "anchor": ((*_ONLINE, *_LISTS), *_ANY),
    "tau": (_LISTS, *_POSITIVE),
}


FOREIGN = (  # options of a policy's surrogate and advantage, or of demonstrations, which a contrast has not
    "rl",
    "demo_reward",
    "group_statistics",
    "solved",
    "kl",
    "kl_coef",
    "entropy_coef",
    "advantage",
    "scale_rewards",
    "epsilon",
    "epsilon_high",
    "delta",
    "pass_k",
    "correction",
    "correction_min",
    "correction_max",
    "off_policy_mask_threshold",
    *HYBRID_RANGES,
)


_DEFAULTS = {f.name: f.default for f in fields(Hybrid)}


def choose_fusion(config: Hybrid) -> HybridAlgorithm | GroupPreference:
    """The row of HYBRIDS or FUSIONS, with the run's own settings where it has them.

    Raises UserError for options that do not go together.
    """
    rows: Mapping[str, HybridAlgorithm | GroupPreference] = HYBRIDS | FUSIONS
    if config.algorithm not in rows:
        near = nearest(config.algorithm, rows)
        raise UserError(f"--algorithm: expected one of {', '.join(rows)}; got {config.algorithm!r}{near}")
    for name, (takers, fine, expected) in OPTIONS.items():
        value, option = getattr(config, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if config.algorithm not in takers:
            raise UserError(
                f"{option}: {config.algorithm} has no such setting; take an --algorithm that has: "
                f"{', '.join(takers)}"
            )
        if not fine(value):
            raise UserError(f"{option}: expected {expected}, got {value}")
    row = rows[config.algorithm]
    if isinstance(row, HybridAlgorithm):
        return _mixed(row, config) if row.pairs is None else _fused(row.pairs, config)
    return _online(row, config) if isinstance(row.comparison, OnlinePairs) else _listwise(row, config)


def _fused(pairs: OfflinePairs, config: Hybrid) -> HybridAlgorithm:
    chosen = choose_hybrid(config, _MIXED)
    names = {"peak": "pair_coef", "end": "pair_coef_end", "warmup": "pair_warmup", "decay": "pair_decay"}
    given = {key: value for key, name in names.items() if (value := getattr(config, name)) is not None}
    coef = replace(pairs.coef, **given)
    return replace(chosen, pairs=OfflinePairs(_pair_loss(config), coef))


def _mixed(row: HybridAlgorithm, config: Hybrid) -> HybridAlgorithm:
    if config.members == "chosen" and config.rejected_reward is not None:
        raise UserError(
            "--rejected-reward: expected --members both, "
            "which has rejected completions in the group; got chosen"
        )
    return replace(choose_hybrid(config, _MIXED), sides=1 if config.members == "chosen" else row.sides)


def _contrast(row: GroupPreference, config: Hybrid) -> GroupPreference:
    for name in FOREIGN:
        if getattr(config, name) != _DEFAULTS[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option}: {config.algorithm} compares completions with each other, "
                "and has no use for it; leave it out"
            )
    if config.semantics != "paper":
        raise UserError(
            f"--semantics: {config.algorithm} is of no other trainer; leave it out, got {config.semantics}"
        )
    given = {
        name: value for name in ("pairing", "gap", "tau") if (value := getattr(config, name)) is not None
    }
    anchor = config.anchor or row.anchor
    comparison: Any = row.comparison
    return replace(row, group=config.group, anchor=anchor, comparison=replace(comparison, **given))


def _online(row: GroupPreference, config: Hybrid) -> GroupPreference:
    preference = _pair_loss(config)
    if preference.tail != 1.0:
        raise UserError(
            f"--preference: {config.preference} weighs a token by the other side of its pair; "
            "take another loss of pairs"
        )
    if config.anchor is not None and not preference.reference:
        raise UserError(f"--anchor: {config.preference} compares with no reference; leave it out")
    return _contrast(replace(row, preference=preference), config)


def _listwise(row: GroupPreference, config: Hybrid) -> GroupPreference:
    beta = {} if config.beta is None else {"beta": config.beta}
    return _contrast(replace(row, preference=row.preference.with_params(**beta)), config)


def _pair_loss(config: Hybrid) -> Preference:
    row = choose_preference(offline(config), "--preference")
    if not row.paired:
        fine = ", ".join(name for name, other in PREFERENCES.items() if other.paired)
        raise UserError(f"--preference: expected a loss of pairs ({fine}), got {config.preference}")
    return row


def offline(config: Hybrid) -> Dpo:
    """The run of `fastrl dpo` whose pairs a fusion trains on beside its rollouts; it has the fusion's
    optimizer steps for steps.
    """
    shared = {f.name: getattr(config, f.name) for f in fields(Run)}
    if config.pair_dataset is not None:  # its columns have their own names
        shared |= {"dataset": config.pair_dataset, "columns": ()}
    shared["prompts"] = config.pairs or config.prompts
    shared["steps"] = config.steps * config.minibatches * config.epochs
    return Dpo(
        **shared,
        algorithm=config.preference or "dpo",
        beta=config.beta,
        nll_coef=config.nll_coef,
        reference=config.reference,
    )
