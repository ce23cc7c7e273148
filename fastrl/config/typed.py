"""The arguments of a command as they were typed: options by their paths, each given once."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fastrl.config.algorithm import dashed
from fastrl.config.files import UsageError
from fastrl.config.schema import Schema, owners


@dataclass(frozen=True, slots=True)
class Typed:
    """What was typed.

    files    named by --config, in order
    rest     the other arguments, options spelled by their paths
    names    path of an option -> how it was called
    """

    files: list[str]
    rest: list[str]
    names: dict[str, str] = field(default_factory=dict)


def read_arguments(args: Sequence[str], schema: Schema, invocation: Collection[str], prog: str) -> Typed:
    """Raises UsageError for an option that does not exist, or is given twice.

    invocation  further options, that no configuration has
    """
    files, others = _take_files(args)
    flags = _negated(schema, invocation)
    rest: list[str] = []
    names: dict[str, str] = {}
    seen: dict[str, list[str]] = {}  # option -> as it was typed, and its values
    for i, arg in enumerate(others):
        if not arg.startswith("--") or arg == "--":
            rest.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        path = name.replace("-", "_")
        option = _option(name, path, schema, {*invocation, "help", *flags}, prog)
        rest.append(f"--{option}{equals}{value}")

        given = [arg, *_values(others[i + 1 :])]
        same = flags.get(option, option)
        if same in seen:
            raise UsageError(_twice(schema, same, seen[same], given))
        seen[same] = given
        names[option] = path
    return Typed(files, rest, names)


def _take_files(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named by --config, in order (a later one overrides an earlier), and the other arguments."""
    files, rest, queue = [], [], list(args)
    while queue:
        arg = queue.pop(0)
        if arg == "--config":
            if not queue or queue[0].startswith("--"):
                raise UsageError("--config: expected a file, got nothing")
            files.append(queue.pop(0))
        elif arg.startswith("--config="):
            files.append(arg.partition("=")[2])
        else:
            rest.append(arg)
    return files, rest


def _option(name: str, path: str, schema: Schema, others: Collection[str], prog: str) -> str:
    """The path of the option that was typed as --`name`."""
    option = schema.find(path)
    if option is not None:
        return option
    if path in others:
        return path
    elsewhere = schema.advice(path) or owners(path)
    near = None if elsewhere else schema.nearest(path, others)
    hint = f"; did you mean {dashed(near)}?" if near else f"; see {prog} --help"
    raise UsageError(f"unknown option --{name}{elsewhere or hint}")


def _values(following: Sequence[str]) -> list[str]:
    """The arguments up to the next option."""
    values: list[str] = []
    for arg in following:
        if arg.startswith("--"):
            break
        values.append(arg)
    return values


def _negated(schema: Schema, invocation: Collection[str]) -> dict[str, str]:
    """The options that turn a flag off, and the flag: no_resume -> resume."""
    flags = [path for path, kind in schema.general.items() if kind is bool]
    flags += [name for name in invocation if name not in schema.general]
    off = {}
    for path in flags:
        group, dot, name = path.rpartition(".")
        off[f"{group}{dot}no_{name}"] = path
    return off


def _twice(schema: Schema, option: str, first: Sequence[str], second: Sequence[str]) -> str:
    """What is said of an option given twice; of a list, how to give both."""
    known = option in schema.general or schema.find(option) is not None
    kind = schema.kind(option) if known else bool
    mend = "give it once"
    if typing.get_origin(kind) is tuple:
        values = [*_given(first), *_given(second)]
        mend = f"it takes several values: {dashed(option)} {shlex.join(values)}"
    return f"{dashed(option)}: given twice, as `{shlex.join(first)}` and as `{shlex.join(second)}`; {mend}"


def _given(typed: Sequence[str]) -> list[str]:
    """The values of an option and its arguments, after = or behind it."""
    _, equals, value = typed[0].partition("=")
    return [*([value] if equals else []), *typed[1:]]
