"""Values of options: checked against the type of a field, and that type in words."""

from __future__ import annotations

import os
import types
import typing
from typing import Literal, get_args, get_origin

Kind = typing.Any  # the type of a field: a class, a Literal, a tuple or a union of those


def coerce(value: object, kind: Kind) -> object:
    """`value`, as a file gives it, as the type `kind` of a field; ValueError when it is of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        # "None" is the command line's spelling
        if value is None or (value == "None" and type(None) in inner):
            return None
        return coerce(value, next(k for k in inner if k is not type(None)))
    if origin is Literal and value in inner and not isinstance(value, bool):
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(coerce(v, inner[0]) for v in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-4 as a string: it wants 1.0e-4
    if origin is None and type(value) is kind:
        return value
    raise ValueError(value)


def describe(kind: Kind) -> str:
    """The type of a field in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        return f"a list of {describe(inner[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if k is type(None) else describe(k) for k in inner)
    return str(kind.__name__)


def expanded(value: object) -> object:
    """A path with the home directory in place of ~, also within a list, `model:~/...` and
    `implicit:~/...,~/...`; other values as they are.
    """
    if isinstance(value, tuple):
        return tuple(expanded(item) for item in value)
    if not isinstance(value, str):
        return value
    kind, colon, names = value.partition(":")
    if colon and kind in ("model", "implicit"):
        return f"{kind}:{','.join(map(os.path.expanduser, names.split(',')))}"
    return os.path.expanduser(value)


def fits(value: object, kind: Kind) -> bool:
    """Whether a value given in Python has the type `kind` of a field."""
    try:
        coerce(list(value) if isinstance(value, tuple) else value, kind)
    except ValueError:
        return False
    return not (kind is float and isinstance(value, str))
