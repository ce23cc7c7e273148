"""The registry: which implementations an op has, as data; `_backend` chooses among them.

An op file registers its implementations under the op's public name, each as named parts ("forward",
"backward").  A kernel that nobody has seen running on this very GPU is COMPILED_ONLY: it is chosen by default
once it has passed its check there (`_verdicts`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the automatic choice takes the first that fits
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu", "cuda")}

# not seen running on this GPU: chosen by default once it has passed its check there
COMPILED_ONLY = "compiled only"
# batch-invariant, but not the fastest: chosen in exact mode, and when asked for
EXACT_ONLY = "exact mode only"
NOT_BY_DEFAULT = (COMPILED_ONLY, EXACT_ONLY)


@dataclass(frozen=True, slots=True)
class Implementation:
    parts: dict[str, Callable[..., Any]]
    dtypes: tuple[torch.dtype, ...] | None  # None: every dtype
    note: str  # "", COMPILED_ONLY or EXACT_ONLY
    missing: str  # why it cannot be used in this process; empty when it can
    devices: tuple[str, ...]
    obstacle: Callable[[Tensor], str] | None  # why it cannot take a tensor of its devices and dtypes, or ""
    exact: tuple[str, ...] = ()  # the devices on which its forward is batch-invariant
    default: tuple[torch.dtype, ...] | None = None  # dtypes for which it may be chosen by default; None: all


_table: dict[str, dict[str, Implementation]] = {}
exact_blocks: list[None] = []  # for the whole process: one entry for every open `exact` block
_ladders: dict[str, tuple[str, ...]] = {}  # ops with implementation names of their own; others use BACKENDS


def register(
    op: str,
    backend: str,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    note: str = "",
    missing: str = "",
    devices: tuple[str, ...] | None = None,
    obstacle: Callable[[Tensor], str] | None = None,
    exact: tuple[str, ...] = (),
    default: tuple[torch.dtype, ...] | None = None,
    **parts: Callable[..., Any],
) -> None:
    """Add an implementation of `op`; called once, by the op's own file, when it is imported.

    `devices` is needed for a name that is not in BACKENDS.
    """
    _table.setdefault(op, {})[backend] = Implementation(
        parts=parts,
        dtypes=dtypes,
        note=note,
        missing=missing,
        devices=DEVICES[backend] if devices is None else devices,
        obstacle=obstacle,
        exact=exact,
        default=default,
    )


def ladder(op: str, *names: str) -> None:
    """Set the order in which the implementations of `op` are tried; their names may be their own."""
    _ladders[op] = names


def order(op: str) -> tuple[str, ...]:
    """The names an implementation of `op` may have, in the order in which the automatic choice tries them."""
    return _ladders.get(op, BACKENDS)


def register_triton(
    op: str,
    module: str,
    *parts: str,
    exact: bool = False,
    default: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Add the Triton implementation of `op`: the functions `parts` of fastrl.kernels._triton.`module`.

    It takes the module's DTYPES.  `exact` says that it is batch-invariant, `default` for which dtypes it may
    be chosen outside exact mode.  Where triton is not installed (it has no wheels outside Linux) the
    implementation is listed as missing.
    """
    try:
        implementation = importlib.import_module(f"fastrl.kernels._triton.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("triton"):
            raise
        register(op, "triton", missing="triton is not installed")
        return
    register(
        op,
        "triton",
        dtypes=implementation.DTYPES,
        note=COMPILED_ONLY,
        exact=("cuda", "cpu") if exact else (),
        default=default,
        **{part: getattr(implementation, part) for part in parts},
    )


def registered(op: str) -> dict[str, Implementation]:
    """The implementations of `op` by name; raises KeyError for an op that is not registered."""
    return _table[op]


def unproven() -> list[tuple[str, str, Implementation]]:
    """(op, backend, implementation) of all that need a check before they are chosen by default."""
    found = []
    for op, table in sorted(_table.items()):
        for name, i in table.items():
            if i.note == COMPILED_ONLY and not i.missing:
                found.append((op, name, i))
    return found


def op_modules() -> list[str]:
    """The modules that register ops: a process that imports them has this process's registry."""
    named = set()
    for table in _table.values():
        named.add(next(iter(table["reference"].parts.values())).__module__)
    return sorted(named)


def devices(op: str, name: str) -> tuple[str, ...]:
    """Where an implementation of `op` runs."""
    return _table[op][name].devices


@functools.cache  # an import statement that finds its module takes 0.4 us
def extension() -> Any:
    """The compiled module fastrl._C, or None when it was not built (a source tree that was never
    installed).
    """
    try:
        from fastrl import _C  # after torch, whose OpenMP runtime it shares
    except ImportError as error:
        if "fastrl._C" in str(error) or "'_C'" in str(error):
            return None
        raise
    return _C


def unbuilt(function: str) -> str:
    """Why an implementation over `function` of fastrl._C is missing; empty when it was built."""
    return "" if hasattr(extension(), function) else "fastrl._C was built without it"
