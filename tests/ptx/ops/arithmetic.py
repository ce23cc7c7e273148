"""add, sub, mul, div, min and the like, of integers; floats.py has those of floating-point numbers."""

from __future__ import annotations

import numpy as np

from ptx.formats import DTYPES, FLOATS, HALVES, PAIRS, SIZES, Array
from ptx.machine import Machine, Run
from ptx.ops import floats
from ptx.ops.shared import Function, Maker, apply
from ptx.parse import Instruction

WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _quotient(a: Array, b: Array) -> Array:
    """Toward zero; 0 for a division by zero, whose result nobody may use."""
    out, ok = np.zeros_like(a), b != 0
    quotient = np.abs(a[ok]) // np.abs(b[ok])
    out[ok] = quotient * (np.sign(a[ok]) * np.sign(b[ok])) if a.dtype.kind == "i" else quotient
    return out


def _remainder(a: Array, b: Array) -> Array:
    """Of the sign of `a`."""
    out, ok = np.zeros_like(a), b != 0
    remainder = np.abs(a[ok]) % np.abs(b[ok])
    out[ok] = remainder * np.sign(a[ok]) if a.dtype.kind == "i" else remainder
    return out


INTEGERS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "div": _quotient,
    "rem": _remainder,
    "abs": np.abs,
    "neg": lambda a: (~a) + a.dtype.type(1),
}


def _by_type(m: Machine, i: Instruction) -> Run:
    """A floating-point instruction, or one of integers."""
    kind = i.mods[-1]
    if kind in FLOATS or kind in HALVES or kind in PAIRS:
        return floats.make(m, i)
    if "sat" in i.mods:
        raise ValueError("saturating")
    return apply(m, i, [kind] * (len(i.args) - 1), INTEGERS[i.name])


def _high(kind: str) -> Function:
    """The upper half of a product."""
    if SIZES[kind] == 4:
        wide = DTYPES[WIDER[kind]].type
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(DTYPES[kind])

    def high64(a: Array, b: Array) -> Array:
        products = [(int(x) * int(y)) >> 64 & 2**64 - 1 for x, y in zip(a, b, strict=True)]
        return np.array(products, np.uint64).view(DTYPES[kind])

    return high64


def _mul(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    if kind in FLOATS or kind in HALVES or kind in PAIRS:
        return floats.make(m, i)
    if "wide" in i.mods:
        wide = DTYPES[WIDER[kind]]
        return apply(m, i, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide))
    return apply(m, i, [kind, kind], _high(kind) if "hi" in i.mods else np.multiply)


def _mad(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    if kind in FLOATS:
        return floats.make(m, i)
    if "wide" in i.mods:
        wide = DTYPES[WIDER[kind]]
        return apply(m, i, [kind, kind, WIDER[kind]], lambda a, b, c: a.astype(wide) * b.astype(wide) + c)
    if "hi" in i.mods:
        high = _high(kind)
        return apply(m, i, [kind] * 3, lambda a, b, c: high(a, b) + c)
    return apply(m, i, [kind] * 3, lambda a, b, c: a * b + c)


TABLE: dict[str, Maker] = {
    **dict.fromkeys(("add", "sub", "min", "max", "div", "rem", "abs", "neg"), _by_type),
    "mul": _mul,
    "mad": _mad,
    "fma": floats.make,
}
