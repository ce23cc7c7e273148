"""Logic, shifts, and fields of bits."""

from __future__ import annotations

import numpy as np

from ptx.formats import DTYPES, SIZES, Array
from ptx.machine import Machine, Run
from ptx.ops.shared import Function, Maker, apply
from ptx.parse import Instruction

ONE = np.uint64(1)


def _logic(function: Function) -> Maker:
    return lambda m, i: apply(m, i, [i.mods[-1]] * (len(i.args) - 1), function)


def _shift(m: Machine, i: Instruction) -> Run:
    """By more than the width: all bits are gone, or copies of the sign."""
    kind = i.mods[-1]
    width = SIZES[kind] * 8
    signed = kind.startswith("s")

    def run(x: Array, n: Array) -> Array:
        over = n >= width
        by = np.where(over, 0, n).astype(x.dtype)
        moved = np.left_shift(x, by) if i.name == "shl" else np.right_shift(x, by)
        gone = np.where(x < 0, -1, 0) if signed and i.name == "shr" else 0
        return np.where(over, gone, moved).astype(x.dtype)

    return apply(m, i, [kind, "u32"], run)


def _funnel(m: Machine, i: Instruction) -> Run:
    left, wrap = "l" in i.mods, "wrap" in i.mods

    def run(low: Array, high: Array, n: Array) -> Array:
        by = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        out = (both << by) >> np.uint64(32) if left else both >> by
        return out.astype(np.uint32)

    return apply(m, i, ["u32"] * 3, run)


def _extract(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    width = SIZES[kind] * 8

    def run(x: Array, at: Array, length: Array) -> Array:
        at, length = (at & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        out = np.zeros_like(x)
        for lane, (value, a, n) in enumerate(zip(x.tolist(), at.tolist(), length.tolist(), strict=True)):
            field = (value & (1 << width) - 1) >> a & (1 << n) - 1 if a < width else 0
            top = min(a + n - 1, width - 1)
            if kind.startswith("s") and n and value >> top & 1:
                field |= -1 << min(n, max(width - a, 0))
            out[lane] = np.array(field & (1 << width) - 1, f"u{SIZES[kind]}").view(x.dtype)
        return out

    return apply(m, i, [kind, "u32", "u32"], run)


def _insert(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]

    def run(x: Array, into: Array, at: Array, length: Array) -> Array:
        a, n = at.astype(np.uint64), length.astype(np.uint64)
        mask = ((ONE << n) - ONE) << a
        out = (into.astype(np.uint64) & ~mask) | ((x.astype(np.uint64) << a) & mask)
        return out.astype(DTYPES[kind])

    if SIZES[kind] != 4:
        raise ValueError(kind)
    return apply(m, i, [kind, kind, "u32", "u32"], run)


def _permute(m: Machine, i: Instruction) -> Run:
    """Bytes of two registers; bit 3 of a selector repeats the sign."""
    if i.mods != ["b32"]:
        raise ValueError("mode")

    def run(a: Array, b: Array, selectors: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(a.shape, np.uint64)
        for place in range(4):
            selector = selectors >> np.uint32(4 * place)
            byte = (both >> ((selector & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(selector & np.uint32(8), sign, byte)
            out |= byte << np.uint64(8 * place)
        return out.astype(np.uint32)

    return apply(m, i, ["u32"] * 3, run)


def _table(m: Machine, i: Instruction) -> Run:
    """lop3: a truth table of three bits."""
    *i.args, table = i.args
    truth = int(table, 0)

    def run(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a)
        for row in range(8):
            if truth >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    return apply(m, i, ["u32"] * 3, run)


def _count(function: Function) -> Maker:
    def make(m: Machine, i: Instruction) -> Run:
        kind = i.mods[-1].replace("b", "u").replace("s", "u")
        width = SIZES[kind] * 8

        def run(x: Array) -> Array:
            return np.array([function(int(v), width) for v in x], np.uint32)

        return apply(m, i, [kind], run)

    return make


def _highest(x: int, width: int) -> int:
    return (x.bit_length() - 1) & 0xFFFFFFFF


TABLE: dict[str, Maker] = {
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "not": _logic(np.invert),
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _table,
    "popc": _count(lambda x, width: x.bit_count()),
    "clz": _count(lambda x, width: width - x.bit_length()),
    "bfind": _count(_highest),
    "brev": _count(lambda x, width: int(f"{x:0{width}b}"[::-1], 2)),
}
