"""Loads and stores of a warp: where they go, whether they may, and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptx.formats import LANES, Array, Mask
from ptx.memory import WINDOW, WINDOW_SIZE, WINDOWS, Offsets, Region
from ptx.parse import Fault, Instruction
from ptx.races import DISAGREE, EARLY_READ, EARLY_WRITE, View

if TYPE_CHECKING:
    from ptx.machine import Block, Machine, Warp

Bytes = NDArray[np.uint8]
Part = tuple[Region, Offsets, Array | None]  # with the positions among the accesses; None: all
OUTSIDE = "writes bytes of a buffer that no tensor of the call covers"
ENDED = "touches the shared memory of a block that has ended"


def space_of(mods: list[str]) -> str:
    """The state space that an instruction names."""
    for name in mods:
        if name in ("global", "param", "local", "const"):
            return name
        if name.startswith("shared"):
            return "cluster" if name == "shared::cluster" else "shared"
    return "generic"


def load(m: Machine, w: Warp, mask: Mask | None, at: Offsets, size: int, space: str, i: Instruction) -> Bytes:
    """(LANES, size) bytes; those of lanes that are off are zero."""
    lanes, at = _chosen(mask, at)
    _check_alignment(at, size, i)
    out = np.zeros((len(at), size), np.uint8)
    for region, offsets, place in parts(m, w, at, size, space, i):
        index = region.of(offsets, size)
        m.states.read(region, index, w.view, i)
        if not w.alone and region.before is not None and region.before[index].any():
            m.findings.add(EARLY_READ, region.name, i)
        data = region.data[index].reshape(-1, size)
        if place is None:
            out[:] = data
        else:
            out[place] = data
    if lanes is None:
        return out
    full = np.zeros((LANES, size), np.uint8)
    full[lanes] = out
    return full


def store(
    m: Machine, w: Warp, mask: Mask | None, at: Offsets, data: Bytes, size: int, space: str, i: Instruction
) -> None:
    """`data` (LANES, size)."""
    lanes, at = _chosen(mask, at)
    _check_alignment(at, size, i)
    data = data if lanes is None else data[lanes]
    for region, offsets, place in parts(m, w, at, size, space, i):
        if not w.alone and region.base:
            m.findings.add(EARLY_WRITE, region.name, i)
        put(m, region, offsets, data if place is None else data[place], size, w.view, i)


def put(
    m: Machine, region: Region, offsets: Offsets, data: Bytes, size: int, view: View, i: Instruction
) -> None:
    """Write rows of bytes into a region."""
    index = region.of(offsets, size)
    flat = data.reshape(-1)
    if region.writable is not None and not region.writable[index].all():
        m.findings.add(OUTSIDE, region.name, i)
    before = region.data[index].copy()
    region.data[index] = flat
    after = flat if isinstance(index, slice) else region.data[index]
    if (after != flat).any():  # of several lanes, the last one
        m.findings.add(DISAGREE, region.name, i)
    m.states.write(region, index, view, i, before == after)


def parts(m: Machine, w: Warp, at: Offsets, size: int, space: str, i: Instruction) -> Iterator[Part]:
    """The regions of accesses to a space, with offsets in them."""
    if space == "generic" and (at >= WINDOW).any() and (at < WINDOW + WINDOWS * WINDOW_SIZE).any():
        inside = (at >= WINDOW) & (at < WINDOW + WINDOWS * WINDOW_SIZE)
        if not inside.all():
            raise Fault(f"one access to shared and to global memory is not modelled ({i})")
        yield from _by_rank(m, w, (at - WINDOW) // WINDOW_SIZE, (at - WINDOW) % WINDOW_SIZE, size, i)
    elif space == "shared":
        yield _inside(w.block.shared, at & 0xFFFFFFFF, size, i), at & 0xFFFFFFFF, None
    elif space == "cluster":
        rank = np.where(at >= WINDOW_SIZE, (at >> 24) - 1, w.block.rank)
        yield from _by_rank(m, w, rank, at & (WINDOW_SIZE - 1), size, i)
    elif space in ("generic", "global"):
        for region, place in m.memory.parts(at, size, i):
            yield region, (at if place is None else at[place]) - region.base, place
    else:
        raise Fault(f"the state space {space} is not modelled ({i})")


def block_of(m: Machine, w: Warp, address: int) -> tuple[Block, int]:
    """The block of the cluster whose shared memory an address of the cluster's is, and the offset in it."""
    if address >= WINDOW_SIZE:
        return m.blocks[(address >> 24) - 1], address & (WINDOW_SIZE - 1)
    return w.block, address


def _by_rank(m: Machine, w: Warp, ranks: Offsets, at: Offsets, size: int, i: Instruction) -> Iterator[Part]:
    for rank in np.unique(ranks):
        if not 0 <= rank < len(m.blocks):
            raise Fault(f"shared memory of rank {rank} in a cluster of {len(m.blocks)} ({i})")
        block = m.blocks[rank]
        if not block.live:
            m.findings.add(ENDED, block.shared.name, i)
        place = np.flatnonzero(ranks == rank)
        yield _inside(block.shared, at[place], size, i), at[place], place


def _inside(region: Region, at: Offsets, size: int, i: Instruction) -> Region:
    if int(at.min()) < 0 or int(at.max()) + size > region.size:
        where = sorted({int(at.min()), int(at.max())})
        raise Fault(f"out of bounds: {size} bytes at {where} of {region.size} bytes of shared memory ({i})")
    return region


def _chosen(mask: Mask | None, at: Offsets) -> tuple[Array | None, Offsets]:
    if mask is None:
        return None, at
    lanes = np.flatnonzero(mask)
    return lanes, at[lanes]


def _check_alignment(at: Offsets, size: int, i: Instruction) -> None:
    if (at & (size - 1)).any():
        raise Fault(f"misaligned: {size} bytes at {int(at[np.flatnonzero(at & (size - 1))[0]]):#x} ({i})")
