"""Barriers of blocks and clusters, and fences."""

from __future__ import annotations

import numpy as np

from ptx.barriers import Barrier
from ptx.formats import LANES, Array, Mask
from ptx.machine import Machine, Run, Warp
from ptx.operands import read
from ptx.ops.shared import Function, Maker, nothing
from ptx.parse import Fault, Instruction

VOTES: dict[str, Function] = {"popc": np.sum, "and": np.all, "or": np.any}


def _bar(m: Machine, i: Instruction) -> Run:
    """bar.sync, bar.arrive, bar.red, and their other spelling, barrier.cta."""
    if i.mods[0] == "warp":
        return nothing(m, i)
    if "red" in i.mods:
        return _reducing(m, i)
    number = read(m, i, i.args[0], "u32")
    threads = read(m, i, i.args[1], "u32") if len(i.args) > 1 else None
    waits = "arrive" not in i.mods

    def run(w: Warp, mask: Mask | None) -> None:
        _all_lanes(w, mask, i)
        expected = None if threads is None else int(threads(w)[0])
        _barrier(w, int(number(w)[0])).arrive(w, expected, _nothing if waits else None)

    return run


def _nothing() -> None:
    pass


def _barrier(w: Warp, number: int) -> Barrier:
    if number not in w.block.barriers:
        w.block.barriers[number] = Barrier(w.block, number)
    return w.block.barriers[number]


def _all_lanes(w: Warp, mask: Mask | None, i: Instruction) -> None:
    if mask is not None and (w.active & ~mask).any():
        off = np.flatnonzero(w.active & ~mask).tolist()
        raise Fault(f"lanes {off} are not at the barrier that the others of their warp are at ({i})")


def _reducing(m: Machine, i: Instruction) -> Run:
    """A barrier that also counts a predicate over the block."""
    out, number, *threads, predicate = i.args
    at, value = read(m, i, number, "u32"), read(m, i, predicate, "pred")
    vote = VOTES[next(x for x in i.mods if x in VOTES)]
    if threads:
        raise ValueError("a part of the block")
    votes: dict[int, list[Array]] = {}

    def run(w: Warp, mask: Mask | None) -> None:
        _all_lanes(w, mask, i)
        lanes = value(w) if mask is None else value(w)[mask]
        heard = votes.setdefault(w.block.number, [])
        heard.append(lanes)

        def wake() -> None:
            if len(heard) == len(w.block.live):
                votes.pop(w.block.number, None)
            result = vote(np.concatenate(heard))
            kind = np.uint32 if "popc" in i.mods else bool
            m.put(w, out, mask, np.full(LANES, result, kind))

        _barrier(w, int(at(w)[0])).arrive(w, None, wake)

    return run


def _cluster(m: Machine, i: Instruction) -> Run:
    def arrive(w: Warp, mask: Mask | None) -> None:
        _all_lanes(w, mask, i)
        m.cluster_barrier.arrive(w, release="relaxed" not in i.mods)

    def wait(w: Warp, mask: Mask | None) -> None:
        _all_lanes(w, mask, i)
        m.cluster_barrier.wait(w)

    return arrive if "arrive" in i.mods else wait


def _either(m: Machine, i: Instruction) -> Run:
    return _cluster(m, i) if i.mods[0] == "cluster" else _bar(m, i)


def _fence(m: Machine, i: Instruction) -> Run:
    """fence.proxy.async shows the asynchronous proxy what the generic one wrote; no fence orders agents."""
    if "proxy" not in i.mods or not any(x.startswith("async") for x in i.mods):
        return nothing(m, i)

    def run(w: Warp, mask: Mask | None) -> None:
        w.know(w.seen, w.everything())

    return run


def _dependent(m: Machine, i: Instruction) -> Run:
    """Programmatic dependent launch: wait until the launch before has ended, or let the next one begin."""
    if "wait" not in i.mods:
        return nothing(m, i)

    def run(w: Warp, mask: Mask | None) -> None:
        w.alone = True

    return run


def _trap(m: Machine, i: Instruction) -> Run:
    def run(w: Warp, mask: Mask | None) -> None:
        raise Fault(f"trap ({i})")

    return run


TABLE: dict[str, Maker] = {
    "bar": _bar,
    "barrier": _either,
    "fence": _fence,
    "membar": nothing,
    "griddepcontrol": _dependent,
    "nanosleep": nothing,
    "setmaxnreg": nothing,
    "trap": _trap,
}
