"""Files of options: YAML, TOML or JSON, checked against the options of a command."""

from __future__ import annotations

import tomllib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from fastrl.config.schema import Schema, owners
from fastrl.config.values import coerce, describe
from fastrl.errors import UserError

OF_A_RUN = {"model", "output_dir", "steps", "optim"}  # keys of a run's config.yaml


class UsageError(UserError):
    """An option, a key or a value that the command does not take: exit code 2."""


class Contents(NamedTuple):
    """What a file sets.

    values   path of an option -> its value
    foreign  path -> TRL's name, for options that are set by TRL's
    """

    values: dict[str, object]
    foreign: dict[str, str]


def read(path: Path, schema: Schema, refused: Mapping[str, object]) -> Contents:
    """The options that a file sets.  Raises UsageError, also for the keys in `refused`, which say how a
    command is run.
    """
    values: dict[str, object] = {}
    foreign: dict[str, str] = {}
    tree = _tree(path)
    if tree.keys() >= OF_A_RUN and schema.find("output_dir") is None:
        raise UsageError(
            f"{path}: these are the options of a training run, not of this command; name the run instead: "
            f"--model {path.parent}, whose newest checkpoint remembers what it needs"
        )
    for key, value in _flatten(tree, schema, "").items():
        name = key.replace("-", "_")
        if name in refused:
            raise UsageError(
                f"{path}: {key!r} says how to run, not what: give it on the command line, --{key}"
            )

        option = schema.find(name)
        if option is None:
            raise UsageError(f"{path}: {_unknown(key, name, value, schema)}")
        if option in values:
            raise UsageError(f"{path}: {option!r} is set twice (the second time as {key!r})")
        if schema.foreign(name):
            foreign[option] = name

        kind = schema.kind(option)
        try:
            values[option] = coerce(value, kind | None if option not in schema.general else kind)
        except ValueError:
            got = f"{value!r} ({type(value).__name__})"
            raise UsageError(f"{path}: {key}: expected {describe(kind)}, got {got}") from None
    return Contents(values, foreign)


def _unknown(key: str, name: str, value: object, schema: Schema) -> str:
    group = schema.group(name)
    if group:
        advice = schema.advice(name)
        return f"{key}: expected a group of options ({', '.join(group)}), got {value!r}{advice}"
    elsewhere = schema.advice(name) or owners(name)
    if elsewhere:
        return f"unknown key {key!r}{elsewhere}"
    near = schema.nearest(name)
    hint = f"did you mean {near!r}?" if near else f"known are {', '.join(schema.general)}"
    return f"unknown key {key!r}; {hint}"


def _tree(path: Path) -> Mapping[object, object]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    tree: object
    try:
        match path.suffix:
            case ".toml":
                tree = tomllib.loads(text)
            case ".yaml" | ".yml" | ".json":  # JSON is YAML
                tree = yaml.load(text, _UniqueKeys)
            case _:
                raise UsageError(f"{path}: expected a .yaml, .yml, .toml or .json file")
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not valid {path.suffix[1:].upper()}: {reason}") from None

    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected options by name, got {type(tree).__name__}")
    return tree


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is set twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _flatten(tree: Mapping[object, object], schema: Schema, prefix: str) -> dict[str, object]:
    """Nested mappings to dotted keys."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flatten(value, schema, f"{path}.")
        elif value is None and schema.group(path.replace("-", "_")):
            continue  # an empty group: "optim:" with nothing under it
        else:
            flat[path] = value
    return flat
