"""From the options of `fastrl dpo` to a row of PREFERENCES."""

from __future__ import annotations

from dataclasses import replace

from fastrl.algorithms.preference import PREFERENCES, Preference
from fastrl.config import Dpo
from fastrl.config.dpo import TRL_NAMES
from fastrl.errors import UserError, choose


def choose_preference(config: Dpo, option: str = "--algorithm") -> Preference:
    """The table's row with the run's own parameters; `option` is the one that named it, for messages.

    Raises UserError for an unknown row, and for a --reference that the row cannot use.
    """
    name = TRL_NAMES.get(config.algorithm.name, config.algorithm.name)
    row = choose(name, PREFERENCES, option)
    for key in config.algorithm.options:
        value = config.algorithm.number(key)
        assert value is not None
        row = replace(row, nll=value) if key == "nll_coef" else row.with_params(**{key: value})

    _check_reference(row, name, config.reference, option)
    return row


def _check_reference(row: Preference, name: str, asked: str | None, option: str) -> None:
    if row.reference and asked == "none":
        free = ", ".join(n for n, other in PREFERENCES.items() if not other.reference)
        raise UserError(
            f"--reference: {name} compares with a reference model; take precomputed or live, "
            f"or another {option}: {free}"
        )
    if not row.reference and asked in ("precomputed", "live"):
        raise UserError(f"--reference: {name} has no reference model; leave it out, or take none")
    if row.mismatched and asked == "precomputed":
        raise UserError(
            f"--reference: {name} pairs each prompt with another's completion, anew at every step; take live"
        )
