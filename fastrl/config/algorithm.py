"""`--algorithm`: the row a command trains by, and the options that only some rows have.

A row declares its options in the command's table (`Hybrid.rows["chord"]`).  They are written as

    algorithm: {name: chord, mu: 0.5}                                  in a file
    --algorithm chord --algorithm.mu 0.5                               on the command line; --mu for short
    Hybrid(algorithm=AlgorithmChoice("chord", {"mu": 0.5}), ...)       in Python

and an option that is not given keeps the row's own value, which stands in fastrl.algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, overload

from fastrl.config.run import Run
from fastrl.config.values import Kind, coerce, describe
from fastrl.errors import UserError, nearest

Value = float | int | str


class Range(NamedTuple):
    """Which numbers an option may be, as a check and in words."""

    ok: Callable[[float], bool]
    expected: str


ANY = Range(lambda x: True, "")
FINITE = Range(math.isfinite, "a finite number")
POSITIVE = Range(lambda x: 0 < x < math.inf, "a positive number")
NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "a number of 0 or more")
FRACTION = Range(lambda x: 0 <= x <= 1, "a number in [0, 1]")
STEPS = Range(lambda x: x >= 0, "steps, 0 or more")


@dataclass(frozen=True, slots=True)
class RowOption:
    """An option that some rows have.

    kind   its type: float, int, str or a Literal
    help   what it does; shown by `--algorithm NAME --help`
    range  which numbers it may be
    """

    kind: Kind
    help: str
    range: Range = ANY


RowOptions = Mapping[str, RowOption]
Rows = Mapping[str, RowOptions]


@dataclass(frozen=True, slots=True)
class AlgorithmChoice:
    """A row by its name, with those of its options that are set.

    `number`, `count` and `text` read an option: its value, or `default` where it is not set.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)

    @overload
    def number(self, option: str) -> float | None: ...

    @overload
    def number(self, option: str, default: float) -> float: ...

    def number(self, option: str, default: float | None = None) -> float | None:
        """The value of an option that is a number."""
        value = self.options.get(option, default)
        assert not isinstance(value, str), option
        return value

    @overload
    def count(self, option: str) -> int | None: ...

    @overload
    def count(self, option: str, default: int) -> int: ...

    def count(self, option: str, default: int | None = None) -> int | None:
        """The value of an option that is a whole number."""
        value = self.options.get(option, default)
        assert value is None or isinstance(value, int), option
        return value

    @overload
    def text(self, option: str) -> str | None: ...

    @overload
    def text(self, option: str, default: str) -> str: ...

    def text(self, option: str, default: str | None = None) -> str | None:
        """The value of an option that is a text."""
        value = self.options.get(option, default)
        assert value is None or isinstance(value, str), option
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WithAlgorithm(Run):
    """A training command whose loss is chosen by --algorithm.

    Raises:  UserError for an option that the chosen row does not have, or a value it may not be.
    """

    algorithm: AlgorithmChoice
    """A row of the command's table, by its name."""

    rows: ClassVar[Rows] = {}  # every row -> its options, in the order of the table
    other_names: ClassVar[Mapping[str, str]] = {}  # TRL's name of a row -> ours

    def __post_init__(self) -> None:
        if isinstance(self.algorithm, str):
            object.__setattr__(self, "algorithm", AlgorithmChoice(self.algorithm))
        known = self.row_options()
        for option, value in self.algorithm.options.items():
            if option not in known:
                raise UserError(_no_such_option(self, option))
            check(option, value, known[option])

    def row_options(self) -> RowOptions:
        """The options that the chosen row has."""
        return self.options_of(self.algorithm.name)

    @classmethod
    def options_of(cls, name: str) -> RowOptions:
        """The options that a row has."""
        return cls.rows.get(cls.other_names.get(name, name), {})

    @classmethod
    def all_row_options(cls) -> RowOptions:
        """Every option that some row of the command has."""
        return {option: of for row in cls.rows.values() for option, of in row.items()}

    @classmethod
    def takers(cls, option: str) -> str:
        """The rows that have an option, in words."""
        return ", ".join(name for name, row in cls.rows.items() if option in row)


def row_option_names(cls: type[Run]) -> tuple[str, ...]:
    """The options that some row of a command has."""
    return tuple(cls.all_row_options()) if issubclass(cls, WithAlgorithm) else ()


def dashed(option: str) -> str:
    """An option as the command line spells it."""
    return f"--{option.replace('_', '-')}"


def check(option: str, value: object, declared: RowOption) -> None:
    """Raise UserError for a value of another type than the option's, or outside its range."""
    try:
        coerce(value, declared.kind)
    except ValueError:
        raise UserError(f"{dashed(option)}: expected {describe(declared.kind)}, got {value!r}") from None
    if isinstance(value, float | int) and not declared.range.ok(value):
        raise UserError(f"{dashed(option)}: expected {declared.range.expected}, got {value:g}")


def _no_such_option(config: WithAlgorithm, option: str) -> str:
    name, every = config.algorithm.name, config.all_row_options()
    if option not in every:
        return f"{dashed(option)}: no algorithm has this option{nearest(option, every)}"
    takers = config.takers(option)
    return f"{dashed(option)}: {name} has no such option; take an --algorithm that has it: {takers}"
