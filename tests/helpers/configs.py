"""Configurations from flat options, as the command line takes them."""

from __future__ import annotations

from typing import Any, TypeVar

from fastrl.config import AlgorithmChoice, WithAlgorithm

C = TypeVar("C", bound=WithAlgorithm)


def configured(cls: type[C], **options: Any) -> C:
    """The configuration with `options`, those of rows among them; a row's option that is None is left out."""
    names = cls.all_row_options().keys() & options.keys()
    of_row = {name: options.pop(name) for name in sorted(names)}
    given = {name: value for name, value in of_row.items() if value is not None}
    if not given and "algorithm" not in options:
        return cls(**options)
    default: AlgorithmChoice = cls.__dataclass_fields__["algorithm"].default_factory()
    name = options.pop("algorithm", default.name)
    return cls(**options, algorithm=AlgorithmChoice(name, given))


def for_some_row(cls: type[C], **options: Any) -> C:
    """The same, for the first row that has these options: for tests that bring a row of their own."""
    names = cls.all_row_options().keys() & options.keys()
    if names and "algorithm" not in options:
        options["algorithm"] = next(name for name, row in cls.rows.items() if names <= row.keys())
    return configured(cls, **options)
