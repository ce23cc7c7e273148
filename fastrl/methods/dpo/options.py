"""From the options of `fastrl dpo` to a row of PREFERENCES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.config import Dpo
from fastrl.errors import UserError, nearest

TRL_NAMES = {  # its loss_type -> our row
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
}


_POSITIVE: tuple[Callable[[float], bool], str] = (lambda x: 0 < x < math.inf, "a positive number")


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # of the parameters a user may set
    "beta": _POSITIVE,
    "label_smoothing": (lambda x: 0 < x < 0.5, "a share above 0 and below 0.5"),
    "gamma": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "penalty": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "tau": _POSITIVE,
    "desirable_weight": _POSITIVE,
    "undesirable_weight": _POSITIVE,
}


def choose_preference(config: Dpo, named: str = "--algorithm") -> Preference:
    """The table's row with the run's own parameters; `named` is the option that it was asked for by.

    Raises UserError for options that the row has no use for, and values out of range.
    """
    name = TRL_NAMES.get(config.algorithm, config.algorithm)
    if name not in PREFERENCES:
        raise UserError(
            f"{named}: expected one of {', '.join(PREFERENCES)}; "
            f"got {name!r}{nearest(name, [*PREFERENCES, *TRL_NAMES])}"
        )
    row = PREFERENCES[name]
    for key, (fine, expected) in RANGES.items():
        value = getattr(config, key)
        if value is None:
            continue
        option, article = f"--{key.replace('_', '-')}", "an" if named == "--algorithm" else "a"
        if key not in row.params:
            have = ", ".join(n for n, r in PREFERENCES.items() if key in r.params)
            raise UserError(
                f"{option}: {name} has no such parameter; leave it out, "
                f"or take {article} {named} that has: {have}"
            )
        if not fine(value):
            raise UserError(f"{option}: expected {expected}, got {value:g}")
        row = row.with_params(**{key: value})
    row = _with_nll(row, name, config.nll_coef)
    _check_reference(row, name, config.reference, named)
    return row


def _with_nll(row: Preference, name: str, coef: float | None) -> Preference:
    if coef is None:
        return row
    if not row.paired:
        raise UserError(
            f"--nll-coef: {name} has no pairs, whose chosen completion it is the weight of; leave it out"
        )
    if not 0 <= coef < math.inf:
        raise UserError(f"--nll-coef: expected a number of at least 0, got {coef:g}")
    return replace(row, nll=coef)


def _check_reference(row: Preference, name: str, asked: str | None, named: str) -> None:
    if row.reference and asked == "none":
        free = ", ".join(n for n, r in PREFERENCES.items() if not r.reference)
        raise UserError(
            f"--reference: {name} compares with a reference model; take precomputed or live, "
            f"or another {named}: {free}"
        )
    if not row.reference and asked in ("precomputed", "live"):
        raise UserError(f"--reference: {name} has no reference model; leave it out, or take none")
    if row.mismatched and asked == "precomputed":
        raise UserError(
            f"--reference: {name} pairs each prompt with another's completion, anew at every step; take live"
        )
