"""cvt: between number formats."""

from __future__ import annotations

import numpy as np

from ptx.formats import DTYPES, FLOATS, HALVES, PAIRS, RAW, Array, flush, joined, narrow, widen
from ptx.machine import Machine, Run
from ptx.ops.shared import Function, Maker, apply
from ptx.parse import Instruction

TO_INTEGER: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
DIRECTED = ("rz", "rm", "rp")


def fitted(m: Machine, register: str, x: Array) -> Array:
    """An integer in a wider register: extended by its sign, or by zeros."""
    width = m.kernel.width(register)
    if not width or x.itemsize >= width:
        return x
    signed = x.dtype.kind == "i"
    return x.astype(f"i{width}") if signed else x.view(RAW[x.itemsize]).astype(RAW[width])


def _make(m: Machine, i: Instruction) -> Run:
    to, source = i.mods[-2], i.mods[-1]
    if to in PAIRS:
        return _pair(m, i, to[:-2], source)
    if to not in DTYPES or source not in DTYPES:
        raise ValueError(f"{source} to {to}")
    function = _function(i, to, source)
    return apply(m, i, [source], lambda x: fitted(m, i.args[0], function(x)))


def _pair(m: Machine, i: Instruction, half: str, source: str) -> Run:
    if source != "f32" or "rn" not in i.mods or "relu" in i.mods:
        raise ValueError(f"a pair of {half}")
    return apply(m, i, ["f32", "f32"], lambda high, low: joined(narrow(low, half), narrow(high, half)))


def _function(i: Instruction, to: str, source: str) -> Function:
    mods = i.mods
    before = (lambda x: widen(x, source)) if source in HALVES else (lambda x: x)
    if to in HALVES:
        if any(d in mods for d in DIRECTED):
            raise ValueError("rounding other than to nearest")
        return lambda x: narrow(_floating(before(x)), to)
    if to in FLOATS:
        return lambda x: _to_float(before(x), to, mods)
    if source in FLOATS or source in HALVES:
        return lambda x: _to_integer(before(x), to, mods)
    return lambda x: _between_integers(x, to, "sat" in mods)


def _floating(x: Array) -> Array:
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def _to_float(x: Array, to: str, mods: list[str]) -> Array:
    for name, function in TO_INTEGER.items():
        if name in mods:
            x = function(x)
    y = x.astype(DTYPES[to])
    if to == "f32" and x.dtype != np.float32:
        y = _directed(y, x, mods)
    if "sat" in mods:
        y = np.clip(np.where(np.isnan(y), 0, y), 0, 1).astype(y.dtype)
    return flush(y) if "ftz" in mods and to == "f32" else y


def _directed(y: Array, x: Array, mods: list[str]) -> Array:
    """y, x rounded to nearest, moved to where the modifiers round."""
    if not any(d in mods for d in DIRECTED):
        return y
    if x.dtype.kind != "f":
        raise ValueError("directed rounding of an integer")
    back = y.astype(np.float64)
    target = np.float32(0 if "rz" in mods else -np.inf if "rm" in mods else np.inf)
    wrong = np.abs(back) > np.abs(x) if "rz" in mods else back > x if "rm" in mods else back < x
    return np.where(wrong, np.nextafter(y, target), y)


def _to_integer(x: Array, to: str, mods: list[str]) -> Array:
    """Clamped to the range of the type; NaN gives 0."""
    function = next(f for name, f in TO_INTEGER.items() if name in mods)
    whole = np.nan_to_num(function(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    range_ = np.iinfo(DTYPES[to])
    inside = np.clip(whole, float(range_.min), np.nextafter(float(range_.max) + 1, 0))
    out = inside.astype(DTYPES[to])
    out = np.where(whole >= float(range_.max), range_.max, out)
    return np.where(whole <= float(range_.min), range_.min, out).astype(DTYPES[to])


def _between_integers(x: Array, to: str, saturate: bool) -> Array:
    if saturate:
        range_, own = np.iinfo(DTYPES[to]), np.iinfo(x.dtype)
        x = np.clip(x, max(range_.min, own.min), min(range_.max, own.max))
    return x.astype(DTYPES[to])


TABLE: dict[str, Maker] = {"cvt": _make}
