"""Tensor cores of four warps: wgmma multiplies tiles that lie in shared memory, in the background.

A descriptor says where a tile begins, how its 8-row groups follow, and how its rows are permuted.  K-major:
a row holds the elements that are summed over; else a row holds those of M or N ("transposed").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ptx.formats import HALVES, Array, Mask, widen
from ptx.machine import Machine, Run, Warp
from ptx.operands import Read, read, reads
from ptx.ops.bulk import swizzled
from ptx.ops.matrix import fragment, places
from ptx.ops.shared import Maker, nothing
from ptx.parse import Fault, Instruction, elements
from ptx.races import View

SHAPE = re.compile(r"m64n(\d+)k16$")
DEPTH = 16  # elements that are summed over
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # code in a descriptor -> bytes


@dataclass(frozen=True, slots=True)
class Descriptor:
    start: int  # bytes, as the strides are
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        def field(at: int) -> int:
            return (bits >> at & 0x3FFF) << 4

        if bits >> 49 & 7:
            raise Fault("a descriptor with a base offset is not modelled")
        return cls(field(0), field(16), field(32), SWIZZLES[bits >> 62])

    def addresses(self, rows: Array, transposed: bool) -> Array:
        """(rows, DEPTH) shared addresses of 16-bit elements."""
        r, k = rows[:, None], np.arange(DEPTH)[None, :]
        if self.swizzle == 0:
            if transposed:
                raise Fault("a transposed tile without a swizzle is not modelled")
            at = self.start + r // 8 * self.stride + k // 8 * self.leading + r % 8 * 16 + k % 8 * 2
        elif transposed:
            wide = self.swizzle // 2
            outer = r // wide * self.leading + k // 8 * self.stride
            at = self.start + outer + k % 8 * self.swizzle + r % wide * 2
        else:
            at = self.start + r // 8 * self.stride + r % 8 * self.swizzle + k * 2
        return swizzled(at, self.swizzle)


@dataclass(frozen=True, slots=True)
class Tile:
    """One operand: a descriptor's, or a fragment in registers."""

    descriptor: Read | None
    registers: list[Read]
    transposed: bool
    negative: bool
    kind: str

    def value(self, m: Machine, w: Warp, rows: Array, view: View, i: Instruction) -> Array:
        """(rows, DEPTH) float64."""
        sign = -1.0 if self.negative else 1.0
        if self.descriptor is None:
            return sign * fragment([r(w) for r in self.registers], self.kind, 16)

        at = Descriptor.of(int(self.descriptor(w)[0])).addresses(rows, self.transposed)
        region = w.block.shared
        if int(at.max()) + 2 > region.size:
            raise Fault(f"out of bounds: wgmma reads {int(at.max())} of {region.size} bytes ({i})")
        index = (at.reshape(-1, 1) + np.arange(2)).reshape(-1)
        m.states.read(region, index, view, i)
        numbers = region.data[index].view(np.uint16).reshape(at.shape)
        return sign * widen(numbers, self.kind).astype(np.float64)


def _multiply(m: Machine, i: Instruction) -> Run:
    columns = int(next(s for s in map(SHAPE.match, i.mods) if s).group(1))
    kind = i.mods[-1]
    if i.mods[-3] != "f32" or kind not in HALVES:
        raise ValueError(i.op)
    outs, keep = elements(i.args[0]), read(m, i, i.args[3], "pred")
    left, right = _operands(m, i, kind)
    rows = np.arange(columns)

    def run(w: Warp, mask: Mask | None) -> None:
        view = w.beside(w.products.agent, w.products.clock, asynchronous=True)
        own = np.arange(16) + 16 * (w.number % 4)
        product = left.value(m, w, own, view, i) @ right.value(m, w, rows, view, i).T
        add = bool(keep(w)[0])

        def land() -> None:
            for (row, column), out in zip(places(columns), outs, strict=True):
                before = w.registers[out].view(np.float32) if add else 0.0
                m.put(w, out, None, (product[row, column] + before).astype(np.float32))

        if m.schedule.late:
            w.products.open.append(land)
        else:
            land()

    return run


def _operands(m: Machine, i: Instruction, kind: str) -> tuple[Tile, Tile]:
    _, a, b, _, sign_a, sign_b, *transposed = i.args
    in_registers = a.startswith("{")
    flags = ["0", *transposed] if in_registers else transposed
    if len(flags) != 2:
        raise ValueError("transpositions")
    left = Tile(
        None if in_registers else read(m, i, a, "u64"),
        reads(m, i, elements(a), "b32") if in_registers else [],
        flags[0] != "0",
        sign_a == "-1",
        kind,
    )
    return left, Tile(read(m, i, b, "u64"), [], flags[1] != "0", sign_b == "-1", kind)


def _make(m: Machine, i: Instruction) -> Run:
    if i.mods[0] == "fence":
        return nothing(m, i)
    if i.mods[0] == "commit_group":
        return lambda w, mask: w.products.close()
    if i.mods[0] == "wait_group":
        left = int(i.args[0], 0)
        return lambda w, mask: w.products.wait(w, left)
    return _multiply(m, i)


TABLE: dict[str, Maker] = {"wgmma": _make}
