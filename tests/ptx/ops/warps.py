"""What the lanes of a warp tell one another."""

from __future__ import annotations

import numpy as np

from ptx.formats import DTYPES, LANE, LANES, Array, Mask
from ptx.machine import Machine, Run, Warp
from ptx.operands import read
from ptx.ops.shared import Function, Maker
from ptx.parse import Fault, Instruction

BITS = np.uint32(1) << LANE.astype(np.uint32)


def members(m: Machine, w: Warp, mask: Mask | None, wanted: int, i: Instruction) -> None:
    """Lanes that an instruction names are there."""
    if mask is None:
        return
    missing = ((wanted >> LANE) & 1).astype(bool) & w.active & ~mask
    if missing.any():
        raise Fault(f"lanes {np.flatnonzero(missing).tolist()} of its mask are elsewhere ({i})")


def _sources(mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """The lane each lane reads, and whether that lies in its segment."""
    clamp, segment = c & 31, (c >> 8) & 31
    low, high = LANE & segment, (LANE & segment) | (clamp & ~segment)
    at = {"bfly": LANE ^ b, "idx": low | (b & ~segment), "up": LANE - b, "down": LANE + b}[mode]
    ok = at >= high if mode == "up" else at <= high
    return np.where(ok, at, LANE), ok


def _shfl(m: Machine, i: Instruction) -> Run:
    mode = i.mods[1]
    out, _, p = i.args[0].partition("|")
    value, lane, clamp, who = (read(m, i, a, "b32") for a in i.args[1:5])

    def run(w: Warp, mask: Mask | None) -> None:
        wanted = who(w)
        members(m, w, mask, int(wanted[0] if mask is None else wanted[mask][0]), i)
        at, ok = _sources(mode, lane(w).astype(np.int64) & 31, clamp(w).astype(np.int64))
        if mask is not None and (mask & ~mask[at]).any():
            m.findings.add("shfl reads a lane that is off", w.agent, i)
        if out != "_":
            m.put(w, out, mask, value(w)[at])
        if p:
            m.put(w, p, mask, ok)

    return run


REDUCTIONS: dict[str, Function] = {
    "add": lambda x: x.sum(dtype=x.dtype),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def _redux(m: Machine, i: Instruction) -> Run:
    kind, function = i.mods[-1], REDUCTIONS[i.mods[1]]
    value, who = read(m, i, i.args[1], kind), read(m, i, i.args[2], "b32")
    if "abs" in i.mods or "NaN" in i.mods:
        raise ValueError("modifier")

    def run(w: Warp, mask: Mask | None) -> None:
        members(m, w, mask, int(who(w)[0]), i)
        x = value(w) if mask is None else value(w)[mask]
        m.put(w, i.args[0], mask, np.full(LANES, function(x), DTYPES[kind]))

    return run


def _ballot(chosen: Array) -> Array:
    return np.full(LANES, int(BITS[chosen].sum()), np.uint32)


def _vote(m: Machine, i: Instruction) -> Run:
    value = read(m, i, i.args[1], "pred")
    who = read(m, i, i.args[2], "b32") if len(i.args) > 2 else None
    mode = next(x for x in i.mods if x in ("ballot", "any", "all", "uni"))

    def run(w: Warp, mask: Mask | None) -> None:
        if who is not None:
            members(m, w, mask, int(who(w)[0]), i)
        on = np.ones(LANES, bool) if mask is None else mask
        x = value(w) & on
        every, some = bool((x | ~on).all()), bool(x.any())
        result = {"any": some, "all": every, "uni": every or not some}.get(mode)
        m.put(w, i.args[0], mask, _ballot(x) if result is None else np.full(LANES, result))

    return run


def _activemask(m: Machine, i: Instruction) -> Run:
    def run(w: Warp, mask: Mask | None) -> None:
        m.put(w, i.args[0], mask, _ballot(np.ones(LANES, bool) if mask is None else mask))

    return run


def _elect(m: Machine, i: Instruction) -> Run:
    """One lane: the first."""
    out, _, p = i.args[0].partition("|")

    def run(w: Warp, mask: Mask | None) -> None:
        first = 0 if mask is None else int(np.flatnonzero(mask)[0])
        if out != "_":
            m.put(w, out, mask, np.full(LANES, first, np.uint32))
        m.put(w, p, mask, first == LANE)

    return run


def _match(m: Machine, i: Instruction) -> Run:
    kind = i.mods[-1]
    value = read(m, i, i.args[1], kind)
    if "any" not in i.mods:
        raise ValueError("mode")

    def run(w: Warp, mask: Mask | None) -> None:
        x = value(w)
        on = np.ones(LANES, bool) if mask is None else mask
        found = [int(BITS[(x == v) & on].sum()) for v in x]
        m.put(w, i.args[0], mask, np.array(found, np.uint32))

    return run


def _brx(m: Machine, i: Instruction) -> Run:
    """A jump by an index that all lanes share: how specialised warps reach their part of a kernel."""
    index, targets = read(m, i, i.args[0], "u32"), m.kernel.targets(i)

    def run(w: Warp, mask: Mask | None) -> None:
        to = index(w)
        if len(w.groups) != 1 or (to != to[0]).any():
            raise Fault(f"lanes of a warp jump to different places ({i})")
        w.groups[0].at = targets[int(to[0])]

    return run


TABLE: dict[str, Maker] = {
    "brx": _brx,
    "shfl": _shfl,
    "redux": _redux,
    "vote": _vote,
    "activemask": _activemask,
    "elect": _elect,
    "match": _match,
}
