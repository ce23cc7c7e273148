"""Errors a user can act on, and the two checks of options that most of them come from."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import signal
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave is wrong; the message says what was expected, what came and what to do.

    of_all  every process of the run raises it, so that the first one alone reports it
    """

    of_all = False


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program at once; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def require(
    option: str,
    value: object,
    ok: bool,
    expected: str,
) -> None:
    """Check an option: UserError `option: expected ..., got value` unless `ok`."""
    if not ok:
        raise UserError(f"{option}: expected {expected}, got {value}")


def choose(name: str, table: Mapping[str, T], option: str) -> T:
    """The entry of `table` called `name`; UserError naming `option`, the table's keys and the nearest one."""
    if name not in table:
        known = ", ".join(table)
        raise UserError(f"{option}: expected one of {known}; got {name!r}{nearest(name, table)}")
    return table[name]


def nearest(name: str, choices: Collection[str]) -> str:
    """`; did you mean 'x'?` when one of `choices` is close to `name`, else the empty string."""
    close = difflib.get_close_matches(name, choices, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def notice(text: str) -> None:
    """Say one line that is no error, on the logger "fastrl": once, and on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("fastrl").warning("fastrl: %s", text)
