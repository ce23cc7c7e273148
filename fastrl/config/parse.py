"""From files and a command line to a configuration, and back.

The dataclasses of this package are the only list of options.  A file (--config) sets them by name, nested or
dotted (`optim: {lr: 1e-4}` or `optim.lr: 1e-4`); the command line overrides it; an option that is not set
keeps its default.  An unknown name is an error that suggests the nearest.  Options of rows are written as
fastrl/config/algorithm.py says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro
import yaml

from fastrl.config.algorithm import AlgorithmChoice, RowOptions, WithAlgorithm, dashed
from fastrl.config.files import UsageError, read
from fastrl.config.schema import ROW, Schema
from fastrl.config.trl import differing
from fastrl.config.typed import read_arguments
from fastrl.config.values import expanded
from fastrl.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Invocation", "UsageError", "dump", "load", "parse", "resolve"]

C = TypeVar("C", bound="DataclassInstance")
VERBATIM = {f"{ROW}step_separator", "columns", "task_options"}  # options whose text is no path: ~ stays
# how a command is run: offered by every command, never part of a configuration
INVOCATION: dict[str, tuple[Any, object, str]] = {
    "config": (
        str | None,
        None,
        "YAML, TOML or JSON file that sets the same options; the command line overrides it.",
    ),
    "dry_run": (bool, False, "Print the resolved configuration as YAML and stop."),
    "debug": (bool, False, "Show tracebacks."),
}


@dataclass(frozen=True, slots=True)
class Invocation(Generic[C]):
    """A configuration, and how the command was asked to treat it."""

    config: C
    dry_run: bool
    debug: bool


def parse(cls: type[C], args: Sequence[str], *, prog: str = "fastrl", quiet: bool = False) -> Invocation[C]:
    """The configuration of class `cls` that `args` (and the files they name by --config) describe.

    Raises:  UsageError for an unknown option or key, an option of another row, or a value of the wrong type
             in a file; SystemExit(2) after tyro's own message for a bad value on the command line,
             SystemExit(0) after --help.
    """
    schema = Schema.of(cls)
    typed = read_arguments(args, schema, INVOCATION, prog)
    rest = typed.rest
    values: dict[str, object] = {}
    names: dict[str, str] = {}  # path of an option -> how it was called last
    for file in typed.files:
        contents = read(Path(file).expanduser(), schema, INVOCATION)
        values |= contents.values
        names |= {path: contents.foreign.get(path, path) for path in contents.values}
    names |= typed.names

    offered = _offered(cls, rest, values)
    command = _command(cls, offered)
    by_field = {_without_prefix(path): value for path, value in values.items()}
    default = _build(command, by_field, missing=tyro.MISSING)
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        about = _about(cls, schema, prog)
        parsed = tyro.cli(command, args=rest, default=default, prog=prog, description=about)

    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(cls)}
    given |= {ROW + option: getattr(parsed, option) for option in offered}
    config = _configuration(cls, given)
    _check_foreign(config, names, schema)
    return Invocation(config, dry_run=parsed.dry_run, debug=parsed.debug)


def resolve(cls: type[C], args: Sequence[str] = ()) -> C:
    """The configuration that command-line `args` describe, as `parse` returns it."""
    return parse(cls, args).config


def load(cls: type[C], path: str | Path) -> C:
    """The configuration of class `cls` that a YAML, TOML or JSON file describes; `load(cls, file of dump(c))
    == c`.

    Raises:  UsageError for an unknown key, a wrong type, or a required option that is missing.
    """
    schema = Schema.of(cls)
    values, foreign = read(Path(path), schema, INVOCATION)
    for field in dataclasses.fields(cls):
        if _is_required(field) and field.name not in values:
            raise UsageError(f"{path}: required option {field.name!r} is missing")
    try:
        config = _configuration(cls, values)
        _check_foreign(config, foreign, schema)
    except UserError as error:
        raise UsageError(f"{path}: {error}") from None
    return config


def dump(config: DataclassInstance) -> str:
    """A configuration as YAML, every option in it."""
    tree = dataclasses.asdict(config)
    if isinstance(config, WithAlgorithm):
        name, options = config.algorithm.name, config.algorithm.options
        tree["algorithm"] = {"name": name, **options} if options else name
    plain = json.loads(json.dumps(tree))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _check_foreign(config: DataclassInstance, names: Mapping[str, str], schema: Schema) -> None:
    """Refuse an option that was given by TRL's name where it means something else in this configuration."""
    foreign = {path: name for path, name in names.items() if schema.foreign(name)}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, WithAlgorithm):
        values["algorithm"] = config.algorithm.name
    problem = differing(foreign, values)
    if problem:
        raise UsageError(problem)


# --- from values to a configuration -----------------------------------------------------------------
def _configuration(cls: type[C], values: Mapping[str, Any]) -> C:
    """An instance of `cls` with `values`, by path or by field; UsageError for another row's option."""
    chosen: dict[str, Any] = {}
    values = {path: value if path in VERBATIM else expanded(value) for path, value in values.items()}
    if issubclass(cls, WithAlgorithm):
        name = values.get("algorithm", _default(cls, "algorithm").name)
        options = {_without_prefix(path): value for path, value in values.items() if path.startswith(ROW)}
        set_ones = {option: value for option, value in options.items() if value is not None}
        chosen["algorithm"] = AlgorithmChoice(name, set_ones)
    try:
        return _build(cls, {**values, **chosen})
    except UserError as error:
        raise UsageError(str(error)) from None


def _build(cls: type[C], values: Mapping[str, Any], prefix: str = "", **missing: Any) -> C:
    """An instance with `values` in place of its defaults, and `missing` for required options without one."""
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        nested = dataclasses.is_dataclass(kind) and kind is not AlgorithmChoice
        if path in values:
            given[field.name] = values[path]
        elif nested:
            given[field.name] = _build(kind, values, f"{path}.", **missing)
        elif missing and _is_required(field):
            given[field.name] = missing["missing"]
    return cls(**given)


def _default(cls: type[DataclassInstance], name: str) -> Any:
    """The default of an option."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_prefix(path: str) -> str:
    """A path without `algorithm.` in front; other paths as they are."""
    return path.removeprefix(ROW)


# --- the command line -------------------------------------------------------------------------------
def _offered(cls: type, rest: Sequence[str], values: Mapping[str, object]) -> RowOptions:
    """The row options that the command line takes: those that are given, and those of an algorithm that is
    named, which --help shows.
    """
    if not issubclass(cls, WithAlgorithm):
        return {}
    every = cls.all_row_options()
    typed = [arg[2:].partition("=")[0] for arg in rest]
    given = {_without_prefix(path) for path in [*values, *typed]}
    offered = {option: every[option] for option in every if option in given}

    named = _value_of("--algorithm", rest) or values.get("algorithm")
    if named is not None:
        offered |= cls.options_of(str(named))
    return offered


def _value_of(option: str, rest: Sequence[str]) -> str | None:
    """The last value that the command line gives an option."""
    value = None
    for i, arg in enumerate(rest):
        if arg == option and i + 1 < len(rest):
            value = rest[i + 1]
        elif arg.startswith(f"{option}="):
            value = arg.partition("=")[2]
    return value


def _command(cls: type[DataclassInstance], offered: RowOptions) -> type[Any]:
    """`cls` as tyro reads it: with the options of INVOCATION and of rows, the algorithm as a name."""
    fields: list[tuple[str, Any, Any]] = []
    if issubclass(cls, WithAlgorithm):
        argument = tyro.conf.arg(help=_algorithms(cls), metavar="NAME")
        default_name = dataclasses.field(default=_default(cls, "algorithm").name)
        fields.append(("algorithm", Annotated[str, argument], default_name))
    for name, declared in offered.items():
        argument = tyro.conf.arg(
            name=ROW + name,
            aliases=[dashed(name)],
            help=declared.help,
            help_behavior_hint="",
            metavar=_metavar(declared.kind),
        )
        fields.append((name, Annotated[declared.kind | None, argument], dataclasses.field(default=None)))
    for name, (kind, default, text) in INVOCATION.items():
        argument = tyro.conf.arg(help=text)
        fields.append((name, Annotated[kind, argument], dataclasses.field(default=default)))

    unchecked = {"__post_init__": lambda self: None}  # the configuration itself is checked
    return dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), namespace=unchecked, frozen=True, kw_only=True
    )


def _metavar(kind: Any) -> str:
    """What stands for a value in --help."""
    choices = typing.get_args(kind)
    return "{" + ",".join(choices) + "}" if choices else str(kind.__name__).upper()


def _algorithms(cls: type[WithAlgorithm]) -> str:
    """The help of --algorithm."""
    text = f"The loss, one of {', '.join(cls.rows)}"
    others = ", ".join(cls.other_names)
    return f"{text}; or TRL's name of one: {others}." if others else f"{text}."


def _about(cls: type, schema: Schema, prog: str) -> str:
    """What stands above the options in --help."""
    parts = [inspect.cleandoc(cls.__doc__ or "")]
    if issubclass(cls, WithAlgorithm) and cls.rows:
        parts.append(
            f"Options of single algorithms are shown by {prog} --algorithm NAME --help, and are written "
            "--algorithm.OPTION, or `algorithm: {name: NAME, OPTION: VALUE}` in a file.  Algorithms with "
            f"options of their own: {', '.join(name for name, row in cls.rows.items() if row)}."
        )
    aliases = schema.aliases()
    if aliases:
        taken = ", ".join(f"--{theirs} = {dashed(ours)}" for theirs, ours in aliases.items())
        parts.append(f"TRL's spellings are accepted too: {taken}.")
    return "\n\n".join(parts)
