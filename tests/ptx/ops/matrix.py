"""Tensor cores of a warp: ldmatrix, stmatrix, mma."""

from __future__ import annotations

import re

import numpy as np

from ptx.access import load, store
from ptx.formats import HALVES, LANE, LANES, Array, Mask, halves, joined, widen
from ptx.machine import Machine, Run, Warp
from ptx.operands import address, read, reads
from ptx.ops.shared import Maker
from ptx.parse import Fault, Instruction, elements

ROW, PAIR = LANE // 4, LANE % 4 * 2  # what a lane holds of an 8 x 8 matrix: two neighbours
SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def _check_form(i: Instruction, mask: Mask | None) -> None:
    if mask is not None:
        raise Fault(f"some lanes are off ({i})")


def _addresses(at: Array, n: int) -> Array:
    """Those of the rows of matrix n, in the lanes 8 n .. 8 n + 7."""
    return at[8 * n : 8 * n + 8]


def _ldmatrix(m: Machine, i: Instruction) -> Run:
    if i.mods[-1] != "b16" or "m8n8" not in i.mods:
        raise ValueError(i.op)
    outs, at, trans = elements(i.args[0]), address(m, i, i.args[1]), "trans" in i.mods

    def run(w: Warp, mask: Mask | None) -> None:
        _check_form(i, mask)
        every = at(w)
        chosen = None if len(outs) == 4 else 8 * len(outs) > LANE
        rows = load(m, w, chosen, every, 16, "shared", i)
        for n, out in enumerate(outs):
            matrix = np.ascontiguousarray(_addresses(rows, n)).view(np.uint16)
            matrix = matrix.T if trans else matrix
            m.put(w, out, None, joined(matrix[ROW, PAIR], matrix[ROW, PAIR + 1]))

    return run


def _stmatrix(m: Machine, i: Instruction) -> Run:
    if i.mods[-1] != "b16" or "m8n8" not in i.mods:
        raise ValueError(i.op)
    at, values = address(m, i, i.args[0]), reads(m, i, elements(i.args[1]), "b32")
    trans = "trans" in i.mods

    def run(w: Warp, mask: Mask | None) -> None:
        _check_form(i, mask)
        rows = np.zeros((LANES, 16), np.uint8)
        for n, value in enumerate(values):
            matrix = np.zeros((8, 8), np.uint16)
            matrix[ROW, PAIR], matrix[ROW, PAIR + 1] = halves(value(w))
            matrix = np.ascontiguousarray(matrix.T) if trans else matrix
            rows[8 * n : 8 * n + 8] = matrix.view(np.uint8)
        chosen = None if len(values) == 4 else 8 * len(values) > LANE
        store(m, w, chosen, at(w), rows, 16, "shared", i)

    return run


def fragment(registers: list[Array], kind: str, rows: int) -> Array:
    """The matrix of 16-bit numbers that lanes hold: registers go down 8 rows, then right 8 columns."""
    down = rows // 8
    out = np.zeros((rows, 8 * (len(registers) // down)), np.float64)
    for n, register in enumerate(registers):
        row, column = ROW + 8 * (n % down), PAIR + 8 * (n // down)
        low, high = halves(register)
        out[row, column], out[row, column + 1] = widen(low, kind), widen(high, kind)
    return out


def places(columns: int) -> list[tuple[Array, Array]]:
    """Where the float32 registers of 16 rows of an accumulator lie."""
    found = []
    for block in range(columns // 8):
        for part in range(4):
            found.append((ROW + 8 * (part // 2), 8 * block + PAIR + part % 2))
    return found


def _mma(m: Machine, i: Instruction) -> Run:
    shape = next(s for s in map(SHAPE.match, i.mods) if s)
    rows, columns, depth = map(int, shape.groups())
    to, kind = i.mods[i.mods.index("col") + 1], i.mods[-3]
    if (rows, columns) != (16, 8) or depth not in (8, 16) or to != "f32" or kind not in HALVES:
        raise ValueError(i.op)
    outs, a, b, c = (elements(x) for x in i.args)
    left, right = reads(m, i, a, "b32"), reads(m, i, b, "b32")
    addends = [read(m, i, x, "f32") for x in c]

    def run(w: Warp, mask: Mask | None) -> None:
        _check_form(i, mask)
        product = fragment([r(w) for r in left], kind, 16) @ fragment([r(w) for r in right], kind, 8).T
        for (row, column), out, addend in zip(places(8), outs, addends, strict=True):
            m.put(w, out, None, (product[row, column] + addend(w)).astype(np.float32))

    return run


TABLE: dict[str, Maker] = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
