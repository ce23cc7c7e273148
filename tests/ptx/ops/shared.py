"""What makers of instructions have in common."""

from __future__ import annotations

from collections.abc import Callable

from ptx.formats import Array, Mask
from ptx.machine import Machine, Run, Warp
from ptx.operands import read
from ptx.parse import Instruction

Maker = Callable[[Machine, Instruction], Run]
Function = Callable[..., Array]


def apply(m: Machine, i: Instruction, kinds: list[str], function: Function) -> Run:
    """destination = function(operands), each operand of its type."""
    destination, *sources = i.args
    if len(sources) != len(kinds):
        raise ValueError(f"expected {len(kinds)} operands, got {len(sources)}")
    values = [read(m, i, s, kind) for s, kind in zip(sources, kinds, strict=True)]
    put = m.put
    if len(values) == 1:
        (first,) = values

        def one(w: Warp, mask: Mask | None) -> None:
            put(w, destination, mask, function(first(w)))

        return one
    if len(values) == 2:
        first, second = values

        def two(w: Warp, mask: Mask | None) -> None:
            put(w, destination, mask, function(first(w), second(w)))

        return two

    def many(w: Warp, mask: Mask | None) -> None:
        put(w, destination, mask, function(*(v(w) for v in values)))

    return many


def nothing(m: Machine, i: Instruction) -> Run:
    """Has no effect here."""
    return lambda w, mask: None
