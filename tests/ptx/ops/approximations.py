"""ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos and approximate division, as far off as documented.

The bounds are those of NVIDIA's PTX ISA 9.1, sections 9.7.3 and 9.7.4.  A GPU errs by some amount within
them; here the result lies at the bound itself, on a side that the `bias` of the machine chooses:

    "up", "down"   every result too large, or too small
    "mixed"        a side for each argument, by a hash of its bits: the same in every schedule
    "exact"        the nearest float32

Zeros, infinities and NaN are exact, as the documentation's tables of corner cases say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ptx.formats import HALVES, PAIRS, Array, flush, halves, joined, narrow, widen
from ptx.machine import Machine, Run
from ptx.ops.shared import Function, Maker, apply
from ptx.parse import Instruction


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a result may lie from the true one; the largest of the three counts."""

    ulp: float = 0  # units in the last place of the correctly rounded result
    relative: float = 0
    absolute: Callable[[Array], Array] | None = None  # a function of the argument


def _of_logarithm(a: Array) -> Array:
    """Absolute between 0.5 and 2, relative elsewhere."""
    return np.where((a > 0.5) & (a < 2), 2.0**-22, 2.0**-22 * np.abs(np.log2(a)))


# (instruction, type) -> its bound
BOUNDS = {
    ("ex2", "f32"): Bound(ulp=2),
    ("lg2", "f32"): Bound(absolute=_of_logarithm),
    ("rcp", "f32"): Bound(ulp=1),
    ("rsqrt", "f32"): Bound(relative=2.0**-22.9),
    ("sqrt", "f32"): Bound(relative=2.0**-23),
    ("div", "f32"): Bound(ulp=2),
    ("tanh", "f32"): Bound(relative=2.0**-11),
    ("sin", "f32"): Bound(absolute=lambda a: np.full(a.shape, 2.0**-20.5)),
    ("cos", "f32"): Bound(absolute=lambda a: np.full(a.shape, 2.0**-20.5)),
    ("ex2", "f16"): Bound(relative=2.0**-9.9),
    ("ex2", "bf16"): Bound(relative=2.0**-7),
    ("tanh", "f16"): Bound(absolute=lambda a: np.full(a.shape, 2.0**-10.987)),
    ("tanh", "bf16"): Bound(absolute=lambda a: np.full(a.shape, 2.0**-8)),
}
FUNCTIONS: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "div": np.divide,
}


def sides(bias: str, bits: Array) -> Array:
    """+1 or -1 for each argument."""
    if bias in ("up", "down"):
        return np.full(bits.shape, 1.0 if bias == "up" else -1.0)
    mixed = (bits * np.uint32(2654435761)) >> np.uint32(31)
    return mixed.astype(np.float64) * 2 - 1


def at_bound(true: Array, bound: Bound, argument: Array, side: Array) -> Array:
    """The float32 farthest from `true` (float64) on a side, within the bound."""
    nearest = true.astype(np.float32)
    ulp = np.spacing(np.abs(nearest)).astype(np.float64)
    allowed = np.abs(true) * bound.relative
    if bound.absolute is not None:
        allowed = np.maximum(allowed, bound.absolute(argument))
    if bound.ulp:
        allowed = np.maximum(allowed, bound.ulp * ulp)
        true = nearest.astype(np.float64)

    moved = (true + side * allowed).astype(np.float32)
    over = np.abs(moved.astype(np.float64) - true) > allowed
    moved = np.where(over, np.nextafter(moved, nearest), moved)
    ok = np.isfinite(nearest) & np.isfinite(moved) & (nearest != 0)
    return np.where(ok, moved, nearest)


def _approximate(m: Machine, name: str, kind: str, mods: list[str], *values: Array) -> Array:
    """The function of float32 values."""
    if "ftz" in mods:
        values = tuple(flush(v) for v in values)
    true = FUNCTIONS[name](*(v.astype(np.float64) for v in values))
    out = true.astype(np.float32)
    if m.bias != "exact":
        mixed = values[0].view(np.uint32)
        for v in values[1:]:
            mixed = mixed * np.uint32(31) + v.view(np.uint32)
        out = at_bound(true, BOUNDS[name, kind], values[0].astype(np.float64), sides(m.bias, mixed))
        out = np.where(values[0] == 0, true.astype(np.float32), out)
    return flush(out) if "ftz" in mods else out


def _on_half(m: Machine, name: str, kind: str, mods: list[str], bits: Array) -> Array:
    return narrow(_approximate(m, name, kind, mods, widen(bits, kind)), kind)


def _on_pair(m: Machine, name: str, kind: str, mods: list[str], bits: Array) -> Array:
    one = partial(_on_half, m, name, kind, mods)
    low, high = halves(bits)
    return joined(one(low), one(high))


def _exact(m: Machine, i: Instruction) -> Run:
    """Correctly rounded, as .rn says; float64's own functions are, for sqrt and the reciprocal."""
    kind = i.mods[-1]
    if "rn" not in i.mods:
        raise ValueError("rounding other than to nearest")
    function = FUNCTIONS[i.name]

    def run(a: Array) -> Array:
        x = flush(a) if "ftz" in i.mods else a
        y = function(x.astype(np.float64)).astype(x.dtype)
        return flush(y) if "ftz" in i.mods else y

    return apply(m, i, [kind], run)


def _gross(m: Machine, i: Instruction) -> Run:
    """rcp and rsqrt of float64 from the upper half of the bits, the lower half zero."""
    upper = np.uint64(0xFFFFFFFF00000000)
    function = FUNCTIONS[i.name]

    def run(a: Array) -> Array:
        x = (a.view(np.uint64) & upper).view(np.float64)
        return (function(x).view(np.uint64) & upper).view(np.float64)

    return apply(m, i, ["f64"], run)


def make(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    if "approx" not in i.mods and "full" not in i.mods:
        return _exact(m, i)
    if kind == "f64":
        return _gross(m, i)
    many = len(i.args) - 1
    if kind in PAIRS:
        return apply(m, i, ["b32"], partial(_on_pair, m, i.name, kind[:-2], i.mods))
    if kind in HALVES:
        return apply(m, i, ["b16"], partial(_on_half, m, i.name, kind, i.mods))
    return apply(m, i, [kind] * many, partial(_approximate, m, i.name, kind, i.mods))


TABLE: dict[str, Maker] = dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos"), make)
