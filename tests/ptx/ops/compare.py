"""Comparisons, and choices by predicates."""

from __future__ import annotations

import numpy as np

from ptx.formats import FLOATS, HALVES, Array, Mask, flush, widen
from ptx.machine import Machine, Run, Warp
from ptx.operands import read
from ptx.ops.shared import Function, Maker, apply
from ptx.parse import Instruction

COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}  # true where one is NaN
COMBINE: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
CLASSES: dict[str, Function] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
}


def _comparison(name: str, kind: str, mods: list[str]) -> Function:
    if kind in HALVES:
        inner = _comparison(name, "f32", [])
        return lambda a, b: inner(widen(a, kind), widen(b, kind))
    if kind not in FLOATS:
        return COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")

    function = COMPARISONS[UNORDERED.get(name, name)]

    def run(a: Array, b: Array) -> Array:
        if "ftz" in mods:
            a, b = flush(a), flush(b)
        nan = np.isnan(a) | np.isnan(b)
        return np.where(nan, name in UNORDERED, function(a, b))

    return run


def _setp(m: Machine, i: Instruction) -> Run:
    """p, and sometimes its opposite q; combined with another predicate."""
    kind = i.mods[-1]
    compare = _comparison(i.mods[0], kind, i.mods)
    first, second = read(m, i, i.args[1], kind), read(m, i, i.args[2], kind)
    p, _, q = i.args[0].partition("|")
    combine = COMBINE.get(i.mods[1])
    third = read(m, i, i.args[3], "pred") if combine is not None else None

    def run(w: Warp, mask: Mask | None) -> None:
        found = compare(first(w), second(w))
        opposite = ~found if q else None
        if combine is not None and third is not None:
            found = combine(found, third(w))
            opposite = combine(opposite, third(w)) if q else None
        if p != "_":
            m.put(w, p, mask, found)
        if opposite is not None:
            m.put(w, q, mask, opposite)

    return run


def _set(m: Machine, i: Instruction) -> Run:
    """All ones, or 1.0, where the comparison holds."""
    kind, to = i.mods[-1], i.mods[-2]
    compare = _comparison(i.mods[0], kind, i.mods)
    if to == "f32":
        return apply(m, i, [kind, kind], lambda a, b: compare(a, b).astype(np.float32))
    ones = np.uint32(0xFFFFFFFF)
    return apply(m, i, [kind, kind], lambda a, b: np.where(compare(a, b), ones, np.uint32(0)))


def _selp(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    return apply(m, i, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


def _testp(m: Machine, i: Instruction) -> Run:
    return apply(m, i, [i.mods[-1]], CLASSES[i.mods[0]])


def _copysign(m: Machine, i: Instruction) -> Run:
    return apply(m, i, [i.mods[-1]] * 2, lambda a, b: np.copysign(b, a))


TABLE: dict[str, Maker] = {
    "setp": _setp,
    "set": _set,
    "selp": _selp,
    "testp": _testp,
    "copysign": _copysign,
}
