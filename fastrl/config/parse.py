"""From a file and a command line to a configuration, and back: the dataclasses say what exists, nothing is
listed twice.

A file (--config) sets the fields by the names of the dataclass, nested or dotted (`optim: {lr: 1e-4}` or
`optim.lr: 1e-4`); the command line overrides it; what neither sets keeps its default.  An unknown name is an
error that suggests the nearest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

import tyro
import yaml

from fastrl.errors import UserError

C = TypeVar("C")  # a configuration dataclass
ALIASES = {  # TRL's name -> ours, on the command line and in files
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "reward_funcs": "reward",
    "num_generations": "group",
    "learning_rate": "optim.lr",
    "max_completion_length": "max_new_tokens",
    "max_steps": "steps",
    "loss_type": "algorithm",
    "beta": "kl_coef",
    "neftune_noise_alpha": "neftune_alpha",
    "label_smoothing_factor": "label_smoothing",
    "num_iterations": "epochs",
    "mask_truncated_completions": "overlong_filter",
    "vllm_importance_sampling_mode": "correction",
    "vllm_importance_sampling_clip_min": "correction_min",
    "vllm_importance_sampling_clip_max": "correction_max",
    "center_rewards_coefficient": "center",
    "num_ppo_epochs": "epochs",
    "num_mini_batches": "minibatches",
    "cliprange": "epsilon",
    "cliprange_value": "value_clip",
    "kl_estimator": "kl",
}
# how a command is run, as against what it runs: offered by every command, never part of a dumped
# configuration
INVOCATION = {
    "config": (
        str | None,
        None,
        "YAML, TOML or JSON file that sets the same options; the command line overrides it.",
    ),
    "dry_run": (bool, False, "Print the resolved configuration as YAML and stop."),
    "debug": (bool, False, "Show tracebacks."),
}


class UsageError(UserError):
    """An option, a key or a value that the command does not take: exit code 2."""


@dataclass(frozen=True, slots=True)
class Invocation(Generic[C]):
    """A configuration, and how the command was asked to treat it."""

    config: C
    dry_run: bool
    debug: bool


def parse(cls: type[C], args: Sequence[str], *, prog: str = "fastrl", quiet: bool = False) -> Invocation[C]:
    """The configuration of class `cls` that `args` (and the files they name by --config) describe.

    Raises:  UsageError for an unknown option or key, or a value of the wrong type in a file; SystemExit(2)
             after tyro's own message for a bad value on the command line, SystemExit(0) after --help.
    """
    known = _leaves(cls)
    files, rest = _take_files(args)
    rest = [_spell(arg, known, prog) for arg in rest]
    values: dict[str, Any] = {}
    for file in files:
        values |= _read(Path(file), cls)
    full = _with_invocation(cls)
    default = _build(full, values, missing=tyro.MISSING)
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        parsed = tyro.cli(full, args=rest, default=default, prog=prog, description=_about(cls, known))
    config = cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]
    return Invocation(config, dry_run=parsed.dry_run, debug=parsed.debug)


def resolve(cls: type[C], args: Sequence[str] = ()) -> C:
    """The configuration that command-line `args` describe; what `parse` returns, without how it was asked
    for.
    """
    return parse(cls, args).config


def load(cls: type[C], path: str | Path) -> C:
    """The configuration of class `cls` that a YAML, TOML or JSON file describes; `load(cls, file of dump(c))
    == c`.

    Raises:  UsageError for an unknown key, a wrong type, or a required option that is not there.
    """
    values = _read(Path(path), cls)
    absent = [p for p in _leaves(cls) if p not in values and _default(cls, p) is dataclasses.MISSING]
    if absent:
        raise UsageError(f"{path}: required option {absent[0]!r} is missing")
    return typing.cast(C, _build(cls, values))


def dump(config: Any) -> str:
    """A configuration as YAML, every option in it."""
    return yaml.safe_dump(
        json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False, allow_unicode=True, width=120
    )


# --- the dataclass, flattened -----------------------------------------------------------------------
def _leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Every option of a configuration class: dotted path -> type."""
    flat: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        flat |= _leaves(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return flat


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "", **missing: Any) -> Any:
    """An instance with `values` (by dotted path) in place of its defaults, and `missing` for the required
    ones not among them.
    """
    hints, given = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        path = prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            given[f.name] = _build(hints[f.name], values, path + ".", **missing)
        elif path in values:
            given[f.name] = values[path]
        elif missing and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            given[f.name] = missing["missing"]
    return cls(**given)


def _default(cls: Any, path: str) -> Any:
    head, _, tail = path.partition(".")
    if tail:
        return _default(typing.get_type_hints(cls)[head], tail)
    f = next(f for f in dataclasses.fields(cls) if f.name == head)
    return f.default_factory if f.default is dataclasses.MISSING else f.default


def _with_invocation(cls: Any) -> Any:
    """`cls` plus the options of INVOCATION, so that --help shows them beside its own."""
    extra = [
        (name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=default))
        for name, (kind, default, text) in INVOCATION.items()
    ]
    return dataclasses.make_dataclass(cls.__name__, extra, bases=(cls,), frozen=True, kw_only=True)


def _about(cls: Any, known: Mapping[str, Any]) -> str:
    taken = [f"--{a} = --{p}" for a, p in ALIASES.items() if p in known and a not in known]
    return (cls.__doc__ or "") + (
        "\n\nTRL's spellings are accepted too: " + ", ".join(taken) + "." if taken else ""
    )


# --- the command line -------------------------------------------------------------------------------
def _take_files(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named by --config, in order (a later one overrides an earlier), and the other arguments."""
    files, rest, queue = [], [], list(args)
    while queue:
        arg = queue.pop(0)
        if arg == "--config":
            if not queue:
                raise UsageError("--config: expected a file, got nothing")
            files.append(queue.pop(0))
        elif arg.startswith("--config="):
            files.append(arg.partition("=")[2])
        else:
            rest.append(arg)
    return files, rest


def _spell(arg: str, known: Mapping[str, Any], prog: str) -> str:
    """An argument with TRL's spelling replaced by ours.  Raises UsageError for an option that does not
    exist.
    """
    if not arg.startswith("--") or arg == "--":
        return arg
    name, equals, value = arg[2:].partition("=")
    path = name.replace("-", "_")
    path = ALIASES.get(path, path) if path not in known else path
    flags = {p for p, kind in known.items() if kind is bool} | (INVOCATION.keys() - known.keys())
    off = {".".join([*p.split(".")[:-1], "no_" + p.split(".")[-1]]) for p in flags}
    if path not in {*known, *INVOCATION, *off, "help"}:
        near = _nearest(path, known)
        hint = f"; did you mean --{near.replace('_', '-')}?" if near else f"; see {prog} --help"
        raise UsageError(f"unknown option --{name}{hint}")
    return f"--{path}{equals}{value}"


def _nearest(path: str, known: Mapping[str, Any]) -> str | None:
    """The option whose dotted path, last name or alias comes closest to what was typed."""
    names = {p: p for p in [*known, *INVOCATION]}
    leaves = {p.split(".")[-1]: p for p in reversed(list(known)) if "." in p}
    aliases = {a: p for a, p in ALIASES.items() if p in known}
    table = aliases | leaves | names
    for typed in (path, path.split(".")[-1]):
        near = difflib.get_close_matches(typed, table, n=1, cutoff=0.6)
        if near:
            return table[near[0]]
    return None


# --- the file ---------------------------------------------------------------------------------------
def _read(path: Path, cls: Any) -> dict[str, Any]:
    """The values a file sets, by dotted path, checked against the fields of `cls`."""
    known = _leaves(cls)
    values: dict[str, Any] = {}
    for key, value in _flatten(_tree(path), known, "").items():
        name = key.replace("-", "_")
        name = ALIASES.get(name, name) if name not in known else name
        if name in INVOCATION:
            raise UsageError(
                f"{path}: {key!r} says how to run, not what: give it on the command line, --{key}"
            )
        if name not in known:
            raise UsageError(f"{path}: {_unknown(key, name, value, known)}")
        if name in values:
            raise UsageError(f"{path}: {name!r} is set twice (the second time as {key!r})")
        try:
            values[name] = _coerce(value, known[name])
        except ValueError:
            raise UsageError(
                f"{path}: {key}: expected {_describe(known[name])}, got {value!r} ({type(value).__name__})"
            ) from None
    return values


def _unknown(key: str, name: str, value: Any, known: Mapping[str, Any]) -> str:
    group = [p.removeprefix(name + ".") for p in known if p.startswith(name + ".")]
    if group:
        return f"{key}: expected a group of options ({', '.join(group)}), got {value!r}"
    near = _nearest(name, known)
    return f"unknown key {key!r}" + (
        f"; did you mean {near!r}?" if near else f"; known are {', '.join(known)}"
    )


def _tree(path: Path) -> dict[str, Any]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    tree: Any
    try:
        match path.suffix:
            case ".toml":
                tree = tomllib.loads(text)
            case ".yaml" | ".yml" | ".json":  # JSON is YAML
                tree = yaml.load(text, _UniqueKeys)
            case _:
                raise UsageError(f"{path}: expected a .yaml, .yml, .toml or .json file")
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected options by name, got {type(tree).__name__}")
    return tree


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is set twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _flatten(tree: Mapping[Any, Any], known: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested mappings to dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        group = path.replace("-", "_") + "."
        if isinstance(value, dict):
            flat |= _flatten(value, known, path + ".")
        elif value is None and any(p.startswith(group) for p in known):
            continue  # an empty group: "optim:" with nothing under it
        else:
            flat[path] = value
    return flat


def _coerce(value: Any, kind: Any) -> Any:
    """`value` as the type `kind` of a field; raises ValueError when it is of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        # "None" is what the command line takes
        if value is None or (value == "None" and type(None) in inner):
            return None
        return _coerce(value, next(k for k in inner if k is not type(None)))
    if origin is Literal and value in inner and not isinstance(value, bool):
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerce(v, inner[0]) for v in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-4 as a string: it wants 1.0e-4
    if origin is None and type(value) is kind:
        return value
    raise ValueError(value)


def _describe(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        return f"a list of {_describe(inner[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if k is type(None) else _describe(k) for k in inner)
    return str(kind.__name__)
