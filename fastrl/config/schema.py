"""The options of a command by the names a user may call them.

An option's path is its place in the configuration: `steps`, `optim.lr`, and `algorithm.mu` for an option of a
row.  A row's option may also be called by its last name, `mu`, and some options by TRL's name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastrl.config.algorithm import AlgorithmChoice, RowOptions, WithAlgorithm
from fastrl.config.dpo import Dpo
from fastrl.config.grpo import Grpo
from fastrl.config.hybrid import Hybrid
from fastrl.config.joint import Joint
from fastrl.config.ppo import Ppo
from fastrl.config.reward import Reward
from fastrl.config.sft import Sft
from fastrl.config.trl import ALIASES, INSTEAD, ONLY
from fastrl.config.values import Kind, describe, fits
from fastrl.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROW = "algorithm."  # before the name of a row's option
OPTION = re.compile(r"(?<!\w)--([a-z][\w.-]*\w)")
TRAINING = {c.__name__.lower(): c for c in (Sft, Reward, Dpo, Grpo, Ppo, Hybrid, Joint)}
CLOSE = 0.75  # least likeness of a name that is suggested; below it save_steps would be steps, and epochs eps


@dataclass(frozen=True, slots=True)
class Schema:
    """The options of one configuration class.

    command  the name of the class, in lower case
    general  path -> type, of what every row of the command takes
    of_rows  name -> declaration, of what some rows have
    """

    command: str
    general: Mapping[str, Kind]
    of_rows: RowOptions

    @staticmethod
    @functools.cache
    def of(cls: type) -> Schema:
        """The options of a configuration class."""
        of_rows = cls.all_row_options() if issubclass(cls, WithAlgorithm) else {}
        return Schema(cls.__name__.lower(), _leaves(cls), of_rows)

    def find(self, name: str) -> str | None:
        """The path of the option that is called `name`; None if there is none."""
        path = self._exact(name)
        if path is None and self._means_the_same(name):
            path = self._exact(ALIASES[name])
        return path

    def foreign(self, name: str) -> bool:
        """Whether an option of the command is called `name` by TRL alone."""
        return self._exact(name) is None and self.find(name) is not None

    def advice(self, name: str) -> str:
        """`: ` and what to give in place of TRL's option of this name, where nothing here means the same;
        else the empty string.
        """
        first = name.partition(".")[0]
        name = name if self.group(first) else first  # `fsdp_config: {...}` in a file
        if name not in INSTEAD or self.find(name) is not None:
            return ""
        text = INSTEAD[name]
        named = [option.replace("-", "_") for option in OPTION.findall(text)]
        lacking = [option for option in named if self.find(option) is None]
        if self.command not in TRAINING and lacking:
            return ""  # `fastrl eval` has no batches of prompts
        having = owners(lacking[0]) if named and len(lacking) == len(named) else ""
        return f": {text}{having.replace('; it is an', ', an')}"

    def kind(self, path: str) -> Kind:
        """The type of the option at a path."""
        return self.general[path] if path in self.general else self.of_rows[path.removeprefix(ROW)].kind

    def group(self, name: str) -> list[str]:
        """The options of a group, by the last part of their paths."""
        return [path.removeprefix(f"{name}.") for path in self.general if path.startswith(f"{name}.")]

    def aliases(self) -> dict[str, str]:
        """TRL's names that are understood here -> our names."""
        ours = {alias: self.find(alias) for alias in ALIASES if self.foreign(alias)}
        return {alias: path.removeprefix(ROW) for alias, path in ours.items() if path is not None}

    def nearest(self, name: str, more: typing.Iterable[str] = ()) -> str | None:
        """The option whose path, last name or TRL's name comes closest to `name`, if it is close."""
        last = {path.split(".")[-1]: path for path in reversed(list(self.general)) if "." in path}
        flat = {path.replace(".", "_"): path for path in self.general}
        ours = {path: path for path in [*self.general, *self.of_rows, *more]}
        table = self.aliases() | last | flat | ours
        if name.startswith(ROW):
            table = {option: option for option in self.of_rows}
        for typed in (name.removeprefix(ROW), name.split(".")[-1]):
            near = difflib.get_close_matches(typed, table, n=1, cutoff=CLOSE)
            if near:
                return table[near[0]]
        return None

    def _means_the_same(self, name: str) -> bool:
        return name in ALIASES and self.command in ONLY.get(name, (self.command,))

    def _exact(self, name: str) -> str | None:
        if name in self.general:
            return name
        if name == f"{ROW}name" and "algorithm" in self.general:
            return "algorithm"
        last = name.removeprefix(ROW)
        return f"{ROW}{last}" if last in self.of_rows else None


def owners(name: str) -> str:
    """`; it is an option of fastrl ...` where training commands have the option, else the empty string."""
    having = [name_of for name_of, c in TRAINING.items() if Schema.of(c).find(name) is not None]
    return f"; it is an option of fastrl {', '.join(having)}" if having else ""


def check_types(config: DataclassInstance) -> None:
    """Raise UserError for a value that was given in Python and has another type than its option."""
    for path, kind in Schema.of(type(config)).general.items():
        value: object = config
        for name in path.split("."):
            value = getattr(value, name)
        value = value.name if isinstance(value, AlgorithmChoice) else value
        if not fits(value, kind):
            got = f"{value!r} ({type(value).__name__})"
            raise UserError(f"--{path.replace('_', '-')}: expected {describe(kind)}, got {got}")


def _leaves(cls: type, prefix: str = "") -> dict[str, Kind]:
    """Every option of a configuration class: path -> type."""
    hints = typing.get_type_hints(cls)
    flat: dict[str, Kind] = {}
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        nested = dataclasses.is_dataclass(kind) and kind is not AlgorithmChoice
        if nested:
            flat |= _leaves(kind, f"{path}.")
        else:
            flat[path] = str if kind is AlgorithmChoice else kind
    return flat
