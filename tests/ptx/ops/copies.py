"""cp.async: 4 to 16 bytes a lane from global to shared memory, in the background."""

from __future__ import annotations

import numpy as np

from ptx.access import Bytes, parts, put
from ptx.formats import LANES, Array, Mask
from ptx.machine import Machine, Run, Warp
from ptx.memory import Offsets, Region
from ptx.operands import address, read
from ptx.ops import bulk
from ptx.ops.shared import Maker
from ptx.parse import Fault, Instruction
from ptx.races import View

UNDER_WAY = np.uint8(0xEE)  # what shared memory holds until a copy lands


def _copy(m: Machine, i: Instruction) -> Run:
    args = i.args[:-1] if any(x.endswith("cache_hint") for x in i.mods) else i.args
    to, source, size = address(m, i, args[0]), address(m, i, args[1]), int(args[2], 0)
    bytes_read = read(m, i, args[3], "u32") if len(args) > 3 else None

    def run(w: Warp, mask: Mask | None) -> None:
        lanes = np.arange(LANES) if mask is None else np.flatnonzero(mask)
        counts = np.full(LANES, size) if bytes_read is None else bytes_read(w).astype(np.int64)
        view = w.beside(w.copies.agent, w.copies.clock)
        data = _source(m, w, source(w)[lanes], np.minimum(counts[lanes], size), size, view, i)
        at = to(w)[lanes]
        if (at % size).any():
            raise Fault(f"misaligned: {size} bytes at {int(at[0]):#x} of shared memory ({i})")
        for region, offsets, _ in parts(m, w, at, size, "shared", i):
            _start(m, w, region, offsets, data, view, i)

    return run


def _source(m: Machine, w: Warp, at: Offsets, counts: Array, size: int, view: View, i: Instruction) -> Bytes:
    """(lanes, size) bytes of global memory, zeros after the `counts` that are read."""
    data = np.zeros((len(at), size), np.uint8)
    for count in np.unique(counts):
        if count == 0:
            continue
        lanes = np.flatnonzero(counts == count)
        if (at[lanes] % size).any():
            raise Fault(f"misaligned: {size} bytes at {int(at[lanes][0]):#x} ({i})")
        for region, offsets, place in parts(m, w, at[lanes], int(count), "global", i):
            index = region.of(offsets, int(count))
            m.states.read(region, index, view, i)
            rows = lanes if place is None else lanes[place]
            data[rows, : int(count)] = region.data[index].reshape(-1, int(count))
    return data


def _start(
    m: Machine, w: Warp, region: Region, offsets: Offsets, data: Bytes, view: View, i: Instruction
) -> None:
    size = data.shape[1]
    put(m, region, offsets, np.full_like(data, UNDER_WAY), size, view, i)
    index, flat = region.of(offsets, size), data.reshape(-1)

    def land() -> None:
        region.data[index] = flat

    if not m.schedule.late:
        land()
    w.copies.open.append(land)


def _commit(m: Machine, i: Instruction) -> Run:
    return lambda w, mask: w.copies.close()


def _wait(m: Machine, i: Instruction) -> Run:
    left = int(i.args[0], 0)
    return lambda w, mask: w.copies.wait(w, left)


def _wait_all(m: Machine, i: Instruction) -> Run:
    def run(w: Warp, mask: Mask | None) -> None:
        w.copies.close()
        w.copies.wait(w, 0)

    return run


FORMS: dict[str, Maker] = {"commit_group": _commit, "wait_group": _wait, "wait_all": _wait_all}


def _make(m: Machine, i: Instruction) -> Run:
    if i.mods[0] != "async" or "mbarrier" in i.mods:
        raise ValueError(i.op)
    if "bulk" in i.mods:
        return bulk.make(m, i)
    form = next((FORMS[x] for x in i.mods if x in FORMS), _copy)
    return form(m, i)


TABLE: dict[str, Maker] = {"cp": _make}
