"""The tensor memory accelerator: whole tiles between global and shared memory, and the barriers in memory
that count what has landed.

A tile lies in shared memory row after row, 16-byte pieces exchanged within 8 rows as the swizzle of the
tensor map says.  All of it belongs to the asynchronous proxy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.access import Bytes, block_of, put
from ptx.barriers import MemoryBarrier
from ptx.formats import LANES, Array, Mask
from ptx.machine import Block, Machine, Run, Warp
from ptx.memory import Index, Offsets, Region
from ptx.operands import Read, address, read
from ptx.ops.shared import Maker, nothing
from ptx.parse import Fault, Instruction, split
from ptx.races import View

TILE = re.compile(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]")
BARRIER_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor as the accelerator sees it; the outermost dimension first, sizes and strides in elements."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int  # bytes of a row of the tile that are permuted together: 0, 32, 64, 128

    @property
    def row(self) -> int:
        """Bytes."""
        return self.box[-1] * self.itemsize

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def rows(self, at: tuple[int, ...]) -> list[tuple[int, int]]:
        """(address, bytes) of the part of each row of the box that lies in the tensor."""
        found = []
        for index in np.ndindex(*self.box[:-1]):
            outer = [a + n for a, n in zip(at[:-1], index, strict=True)]
            inside = all(0 <= o < size for o, size in zip(outer, self.shape[:-1], strict=True))
            first, last = max(at[-1], 0), min(at[-1] + self.box[-1], self.shape[-1])
            if not inside or first >= last or at[-1] < 0:
                found.append((0, 0))
                continue
            offset = sum(o * s for o, s in zip(outer, self.strides[:-1], strict=True)) + first
            found.append((self.base + offset * self.itemsize, (last - first) * self.itemsize))
        return found


def swizzled(at: Array, width: int) -> Array:
    """Where the byte at a shared address lies when rows of `width` bytes are permuted."""
    pieces = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return at ^ (((at >> 7) & pieces) << 4)


def place_of(map_: TensorMap, start: int, i: Instruction) -> Offsets:
    """The shared addresses of a tile's bytes, in order."""
    if start % max(map_.swizzle * 8, 128):
        raise Fault(f"misaligned: a tile at {start:#x} with a swizzle of {map_.swizzle} bytes ({i})")
    if map_.swizzle and map_.row > map_.swizzle:
        raise Fault(f"rows of {map_.row} bytes with a swizzle of {map_.swizzle} ({i})")
    return swizzled(start + np.arange(map_.bytes), map_.swizzle)


# --- copies -----------------------------------------------------------------------------------------
def make(m: Machine, i: Instruction) -> Run:
    if "commit_group" in i.mods:
        return lambda w, mask: w.bulk.close()
    if "wait_group" in i.mods:
        left = int(i.args[0], 0)
        return lambda w, mask: w.bulk.wait(w, left)
    if "prefetch" in i.mods:
        return nothing(m, i)
    if "tensor" not in i.mods:
        raise ValueError("a copy without a tensor map")
    if any("multicast" in x or "im2col" in x or "reduce" in x for x in i.mods):
        raise ValueError("multicast, im2col and reductions")
    return _load(m, i) if i.mods[4].startswith("shared") else _store(m, i)


def _tile(m: Machine, i: Instruction, text: str) -> Callable[[Warp, int], tuple[TensorMap, tuple[int, ...]]]:
    """The tensor map of an operand, and where the box begins, the outermost dimension first."""
    match = TILE.match(text)
    if match is None:
        raise ValueError(text)
    descriptor = read(m, i, match.group(1), "u64")
    coordinates = [read(m, i, c, "s32") for c in split(match.group(2))]

    def tile(w: Warp, lane: int) -> tuple[TensorMap, tuple[int, ...]]:
        found = m.descriptors.get(int(descriptor(w)[lane]))
        if not isinstance(found, TensorMap):
            raise Fault(f"no tensor map at {int(descriptor(w)[lane]):#x} ({i})")
        return found, tuple(int(c(w)[lane]) for c in reversed(coordinates))

    return tile


def _each(mask: Mask | None) -> list[int]:
    return list(range(LANES)) if mask is None else np.flatnonzero(mask).tolist()


def _load(m: Machine, i: Instruction) -> Run:
    to, tile, at = address(m, i, i.args[0]), _tile(m, i, i.args[1]), address(m, i, i.args[2])

    def run(w: Warp, mask: Mask | None) -> None:
        for lane in _each(mask):
            map_, corner = tile(w, lane)
            block, start = block_of(m, w, int(to(w)[lane]))
            barrier = _barrier(m, w, int(at(w)[lane]), i)
            view = w.beside(barrier.agent, barrier.phase + 1, asynchronous=True)
            data = _gather(m, map_, corner, view, i)
            _begin(m, block, place_of(map_, start, i), data, barrier, view, i)

    return run


def _gather(m: Machine, map_: TensorMap, corner: tuple[int, ...], view: View, i: Instruction) -> Bytes:
    """The bytes of a box, zeros outside of the tensor."""
    rows = map_.rows(corner)
    out = np.zeros((len(rows), map_.row), np.uint8)
    for n, (start, size) in enumerate(rows):
        if size:
            region = m.memory.find(start, size, i)
            index = slice(start - region.base, start - region.base + size)
            m.states.read(region, index, view, i)
            out[n, :size] = region.data[index]
    return out.reshape(-1)


def _begin(
    m: Machine, block: Block, at: Offsets, data: Bytes, barrier: MemoryBarrier, view: View, i: Instruction
) -> None:
    """A copy into shared memory that lands some time before its barrier's phase ends."""
    region = block.shared
    _inside(region, at, i)
    put(m, region, at, np.full((len(at), 1), 0xEE, np.uint8), 1, view, i)

    def land() -> None:
        region.data[at] = data
        barrier.landed(len(at))

    if m.schedule.late:
        barrier.landings.append(land)
    else:
        land()


def _store(m: Machine, i: Instruction) -> Run:
    tile, source = _tile(m, i, i.args[0]), address(m, i, i.args[1])

    def run(w: Warp, mask: Mask | None) -> None:
        for lane in _each(mask):
            map_, corner = tile(w, lane)
            at = place_of(map_, int(source(w)[lane]), i)
            view = w.beside(w.bulk.agent, w.bulk.clock, asynchronous=True)
            region = w.block.shared
            _inside(region, at, i)
            m.states.read(region, at, view, i)
            data = region.data[at].reshape(-1, map_.row)
            for (start, size), row in zip(map_.rows(corner), data, strict=True):
                if size:
                    w.bulk.open.append(_row_store(m, start, row[:size], view, i))

    return run


def _row_store(m: Machine, start: int, row: Bytes, view: View, i: Instruction) -> Callable[[], None]:
    region = m.memory.find(start, len(row), i)
    first = np.array([start - region.base])
    index: Index = region.of(first, len(row))
    m.states.write(region, index, view, i, None)
    kept = row.copy()

    def land() -> None:
        region.data[index] = kept

    return land


def _inside(region: Region, at: Offsets, i: Instruction) -> None:
    if int(at.max()) >= region.size:
        raise Fault(f"out of bounds: a tile up to {int(at.max())} of {region.size} bytes ({i})")


# --- barriers in memory -----------------------------------------------------------------------------
def _barrier(m: Machine, w: Warp, at: int, i: Instruction) -> MemoryBarrier:
    block, offset = block_of(m, w, at)
    if offset not in block.memory_barriers:
        raise Fault(f"{w.agent} uses a memory barrier at {offset} that nobody initialised ({i})")
    m.states.read(block.shared, slice(offset, offset + BARRIER_BYTES), w.view, i)
    return block.memory_barriers[offset]


def _init(m: Machine, i: Instruction) -> Run:
    at, count = address(m, i, i.args[0]), read(m, i, i.args[1], "u32")

    def run(w: Warp, mask: Mask | None) -> None:
        for lane in _each(mask):
            block, offset = block_of(m, w, int(at(w)[lane]))
            m.states.write(block.shared, slice(offset, offset + BARRIER_BYTES), w.view, i, None)
            where = f"the memory barrier at {offset} of block {block.number}"
            block.memory_barriers[offset] = MemoryBarrier(int(count(w)[lane]), where)

    return run


def _inval(m: Machine, i: Instruction) -> Run:
    at = address(m, i, i.args[0])

    def run(w: Warp, mask: Mask | None) -> None:
        for lane in _each(mask):
            block, offset = block_of(m, w, int(at(w)[lane]))
            barrier = block.memory_barriers.pop(offset, None)
            if barrier is None:
                raise Fault(f"no memory barrier at {offset} ({i})")
            m.states.write(block.shared, slice(offset, offset + BARRIER_BYTES), w.view, i, None)
            if barrier.landings or barrier.bytes:
                m.findings.add("memory barrier ends with copies under way", barrier.where, i)

    return run


def _arrive(m: Machine, i: Instruction) -> Run:
    """arrive, and expect_tx with or without it."""
    at = address(m, i, next(a for a in i.args if a.startswith("[")))
    last = i.args[-1]
    number = None if last.startswith("[") else read(m, i, last, "u32")
    expects, arrives = "expect_tx" in i.mods, "arrive" in i.mods

    def run(w: Warp, mask: Mask | None) -> None:
        for lane in _each(mask):
            barrier = _barrier(m, w, int(at(w)[lane]), i)
            n = 1 if number is None else int(number(w)[lane])
            if expects:
                barrier.expect(n)
            if arrives:
                barrier.arrive(w, 1 if expects else n, i)

    return run


def _wait(m: Machine, i: Instruction) -> Run:
    if "parity" not in i.mods:
        raise ValueError("a wait for a state")
    at: Read = address(m, i, i.args[1])
    parity = read(m, i, i.args[2], "u32")

    def run(w: Warp, mask: Mask | None) -> None:
        lane = _each(mask)[0]
        barrier = _barrier(m, w, int(at(w)[lane]), i)
        done = barrier.try_wait(w, int(parity(w)[lane]))
        m.put(w, i.args[0], mask, np.full(LANES, done))

    return run


FORMS: dict[str, Maker] = {
    "init": _init,
    "inval": _inval,
    "arrive": _arrive,
    "expect_tx": _arrive,
    "try_wait": _wait,
    "test_wait": _wait,
}


def _make_barrier(m: Machine, i: Instruction) -> Run:
    return FORMS[i.mods[0]](m, i)


TABLE: dict[str, Maker] = {"mbarrier": _make_barrier}
