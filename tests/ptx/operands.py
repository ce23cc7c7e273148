"""Operands of instructions as functions of a warp: registers, numbers, symbols, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.formats import DTYPES, LANE, LANES, RAW, Array
from ptx.parse import Fault, Instruction

if TYPE_CHECKING:
    from ptx.machine import Machine, Warp

Read = Callable[["Warp"], Array]

FLOAT = re.compile(r"-?0[fF]([0-9a-fA-F]{8})$")
DOUBLE = re.compile(r"-?0[dD]([0-9a-fA-F]{16})$")
INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
ADDRESS = re.compile(r"(%?[\w$.]+)\s*(?:\+\s*(-?\w+))?$")
AXES = {"": 0, "x": 0, "y": 1, "z": 2}


def read(m: Machine, i: Instruction, text: str, kind: str) -> Read:
    """The operand `text` as an array of LANES of that type."""
    if text.startswith("%") and text.split(".")[0] in SPECIAL:
        return _special(m, text, DTYPES[kind])
    if text.startswith(("%", "!")) or text in m.kernel.widths:
        return _register(m, text, kind)
    if kind == "pred":
        return _constant(np.full(LANES, text not in ("0", "false")))
    if (bits := _number(text, kind)) is not None:
        return _constant(_spread(bits, DTYPES[kind]))
    if text in m.kernel.symbols:
        return _constant(_spread(m.kernel.symbols[text], DTYPES[kind]))
    if text == m.kernel.dynamic:
        return _constant(_spread(m.dynamic_at, DTYPES[kind]))
    if any(text == p.name for p in m.kernel.parameters):
        return lambda w: _spread(m.offsets[text], DTYPES[kind])
    raise Fault(f"operand {text} is not modelled ({i})")


def reads(m: Machine, i: Instruction, texts: list[str], kind: str) -> list[Read]:
    return [read(m, i, t, kind) for t in texts]


def address(m: Machine, i: Instruction, text: str) -> Read:
    """[%rd7 + 16], [symbol+16], [%r1]: int64 addresses."""
    match = ADDRESS.match(text.strip()[1:-1].strip())
    if match is None:
        raise Fault(f"address {text} is not modelled ({i})")
    base, offset = match.group(1), int(match.group(2) or "0", 0)
    if base in m.kernel.widths or base.startswith("%"):
        return lambda w: _set(w, base).astype(np.int64) + offset
    start = read(m, i, base, "s64")
    return lambda w: start(w) + offset


def _set(w: Warp, name: str) -> Array:
    """A register that must have been set: an address, a predicate."""
    value = w.registers.get(name)
    if value is None:
        raise Fault(f"{name} is used before it is set, by {w.agent}")
    return value


def _register(m: Machine, name: str, kind: str) -> Read:
    dtype = DTYPES[kind]
    if kind == "pred":
        if name.startswith("!"):
            return lambda w: ~_set(w, name[1:])
        return lambda w: _set(w, name)

    def value(w: Warp) -> Array:
        v = w.registers.get(name)
        if v is None:
            v = m.rubbish(dtype.itemsize)
        if v.dtype is dtype:
            return v
        if v.itemsize == dtype.itemsize:
            return v.view(dtype)
        return v.astype(RAW[dtype.itemsize]).view(dtype)

    return value


def _constant(value: Array) -> Read:
    return lambda w: value


def _spread(bits: int, dtype: np.dtype[np.generic]) -> Array:
    size = dtype.itemsize
    return np.full(LANES, bits & ((1 << 8 * size) - 1), RAW[size]).view(dtype)


def _number(text: str, kind: str) -> int | None:
    """The bits of a number in the text, None if it is none."""
    if match := FLOAT.match(text):
        bits = int(match.group(1), 16)
        if kind == "f64":
            return int(np.array(bits, np.uint32).view(np.float32).astype(np.float64).view(np.uint64))
        return bits
    if match := DOUBLE.match(text):
        bits = int(match.group(1), 16)
        if kind == "f32":
            return int(np.array(bits, np.uint64).view(np.float64).astype(np.float32).view(np.uint32))
        return bits
    if match := INTEGER.match(text):
        n = int(match.group(1), 0)
        return -n if text.startswith("-") else n
    return None


# --- special registers ------------------------------------------------------------------------------
SPECIAL: dict[str, Callable[[Machine, Warp, int], object]] = {
    "%tid": lambda m, w, axis: w.number * LANES + LANE if axis == 0 else 0,
    "%ntid": lambda m, w, axis: m.threads if axis == 0 else 1,
    "%ctaid": lambda m, w, axis: w.block.index[axis],
    "%nctaid": lambda m, w, axis: m.grid[axis],
    "%laneid": lambda m, w, axis: LANE,
    "%warpid": lambda m, w, axis: w.number,
    "%cluster_ctaid": lambda m, w, axis: w.block.rank if axis == 0 else 0,
    "%cluster_nctaid": lambda m, w, axis: m.cluster if axis == 0 else 1,
    "%cluster_ctarank": lambda m, w, axis: w.block.rank,
    "%cluster_nctarank": lambda m, w, axis: m.cluster,
    "%clusterid": lambda m, w, axis: w.block.index[0] // m.cluster if axis == 0 else w.block.index[axis],
    "%nclusterid": lambda m, w, axis: m.grid[0] // m.cluster if axis == 0 else m.grid[axis],
}


def _special(m: Machine, text: str, dtype: np.dtype[np.generic]) -> Read:
    name, _, axis = text.partition(".")
    value, at = SPECIAL[name], AXES[axis]

    def special(w: Warp) -> Array:
        number = np.broadcast_to(np.asarray(value(m, w, at)), (LANES,))
        return number.astype(RAW[dtype.itemsize]).view(dtype)

    return special
