"""The instructions that are modelled, by name: `decode` turns one into a function of a warp and its lanes."""

from __future__ import annotations

from ptx.machine import Machine, Run
from ptx.ops import (
    approximations,
    arithmetic,
    bits,
    bulk,
    compare,
    convert,
    copies,
    loads,
    matrix,
    moves,
    synchronize,
    warps,
    wgmma,
)
from ptx.parse import Fault, Instruction

MODULES = (
    approximations,
    arithmetic,
    bits,
    bulk,
    compare,
    convert,
    copies,
    loads,
    matrix,
    moves,
    synchronize,
    warps,
    wgmma,
)
TABLE = {name: maker for module in MODULES for name, maker in module.TABLE.items()}


def decode(m: Machine, i: Instruction) -> Run:
    """What an instruction does."""
    maker = TABLE.get(i.name)
    if maker is None:
        raise Fault(f"instruction {i.op} is not modelled ({i}); add it to a table in tests/ptx/ops")
    try:
        return maker(m, i)
    except (KeyError, ValueError, IndexError) as e:
        raise Fault(f"this form of {i.name} is not modelled ({i}): {e!r}") from e
