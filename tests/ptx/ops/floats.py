"""Arithmetic of floating-point numbers, rounded as the instruction says.

16-bit numbers are widened, computed in float64 and rounded once.  A product and a sum of float32 are rounded
once in `fma`: float64 holds the product exactly, and the sum is rounded to odd before it is rounded again.
"""

from __future__ import annotations

import numpy as np

from ptx.formats import FLOATS, HALVES, PAIRS, Array, flush, halves, joined, narrow, widen
from ptx.machine import Machine, Run
from ptx.ops import approximations
from ptx.ops.shared import Function, apply
from ptx.parse import Instruction


def _xorsign(pick: Function) -> Function:
    """The magnitude of the smaller or larger, with the product's sign."""

    def picked(a: Array, b: Array) -> Array:
        size = pick(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) ^ np.signbit(b), -size, size)

    return picked


def _chain(pick: Function) -> Function:
    """Of two or three operands."""
    return lambda a, b, *c: pick(pick(a, b), *c) if c else pick(a, b)


PLAIN: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "abs": np.abs,
    "neg": np.negative,
    "min": _chain(np.fmin),
    "max": _chain(np.fmax),
}
CARRY_NAN: dict[str, Function] = {"min": _chain(np.minimum), "max": _chain(np.maximum)}
DIRECTIONS = {"rz", "rm", "rp"}


def make(m: Machine, i: Instruction) -> Run:
    """add, sub, mul, fma, mad, div, abs, neg, min, max of floating-point numbers."""
    kind, many = i.mods[-1], len(i.args) - 1
    if kind in PAIRS:
        return apply(m, i, ["b32"] * many, _on_pairs(_in_double(i), kind[:-2]))
    if kind in HALVES:
        return apply(m, i, ["b16"] * many, _on_halves(_in_double(i), kind))
    if i.name in ("fma", "mad"):
        return apply(m, i, [kind] * many, _fused(kind, i.mods))
    if i.name == "div" and ("approx" in i.mods or "full" in i.mods):
        return approximations.make(m, i)
    if i.name == "div" and not DIRECTIONS.isdisjoint(i.mods):
        raise ValueError("rounding of a quotient other than to nearest")
    if i.name in ("add", "sub", "mul") and not DIRECTIONS.isdisjoint(i.mods):
        return apply(m, i, [kind] * many, _directed(PLAIN[i.name], kind, i.mods))
    return apply(m, i, [kind] * many, _with_modifiers(_function(i), i.mods))


def _function(i: Instruction) -> Function:
    function = (CARRY_NAN if "NaN" in i.mods else PLAIN)[i.name] if i.name in CARRY_NAN else PLAIN[i.name]
    return _xorsign(function) if "xorsign" in i.mods else function


def _in_double(i: Instruction) -> Function:
    """The function on float64 values of 16-bit operands."""
    return (lambda a, b, c: a * b + c) if i.name == "fma" else _function(i)


def _on_halves(function: Function, kind: str) -> Function:
    def run(*bits: Array) -> Array:
        return narrow(function(*(widen(b, kind).astype(np.float64) for b in bits)), kind)

    return run


def _on_pairs(function: Function, kind: str) -> Function:
    one = _on_halves(function, kind)

    def run(*bits: Array) -> Array:
        low, high = zip(*(halves(b) for b in bits), strict=True)
        return joined(one(*low), one(*high))

    return run


def _with_modifiers(function: Function, mods: list[str]) -> Function:
    if "ftz" not in mods and "sat" not in mods:
        return function

    def run(*values: Array) -> Array:
        if "ftz" in mods:
            values = tuple(flush(v) for v in values)
        return _finished(function(*values), mods)

    return run


def _finished(x: Array, mods: list[str]) -> Array:
    if "ftz" in mods:
        x = flush(x)
    if "sat" in mods:
        x = np.clip(np.where(np.isnan(x), x.dtype.type(0), x), 0, 1).astype(x.dtype)
    return x


def _fused(kind: str, mods: list[str]) -> Function:
    if kind not in FLOATS:
        raise ValueError(kind)
    if kind == "f64":
        return _fused_double

    def run(a: Array, b: Array, c: Array) -> Array:
        if "ftz" in mods:
            a, b, c = flush(a), flush(b), flush(c)
        product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + addend
        return _finished(_rounded(total, _error(product, addend, total), mods), mods)

    return run


def _fused_double(a: Array, b: Array, c: Array) -> Array:
    """With 64 bits of mantissa between product and sum, which is not quite one rounding."""
    product = a.astype(np.longdouble) * b.astype(np.longdouble)
    return (product + c).astype(np.float64)


def _directed(function: Function, kind: str, mods: list[str]) -> Function:
    if kind != "f32":
        raise ValueError(f"rounding of {kind} other than to nearest")

    def run(a: Array, b: Array) -> Array:
        x, y = a.astype(np.float64), b.astype(np.float64)
        total = function(x, y)
        error = _error(x, y, total) if function is np.add else np.zeros_like(total)
        return _finished(_rounded(total, error, mods), mods)

    return run


def _error(a: Array, b: Array, total: Array) -> Array:
    """a + b - total, exactly."""
    back = total - b
    error = (a - back) + (b - (total - back))
    return np.where(np.isfinite(total), error, 0.0)


def _rounded(total: Array, error: Array, mods: list[str]) -> Array:
    """total + error to float32, rounded as the modifiers say."""
    bits = total.view(np.int64)
    inexact = (error != 0) & ((bits & 1) == 0) & np.isfinite(total) & (total != 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(inexact, (bits + toward).view(np.float64), total)
    single = odd.astype(np.float32)
    back = single.astype(np.float64)
    if "rm" in mods:
        return np.where(back > odd, np.nextafter(single, np.float32(-np.inf)), single)
    if "rp" in mods:
        return np.where(back < odd, np.nextafter(single, np.float32(np.inf)), single)
    if "rz" in mods:
        return np.where(np.abs(back) > np.abs(odd), np.nextafter(single, np.float32(0)), single)
    return single
