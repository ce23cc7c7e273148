"""ld, st and atomic operations."""

from __future__ import annotations

import re

import numpy as np

from ptx.access import load, space_of, store
from ptx.formats import DTYPES, LANES, SIZES, Array, Mask, bytes_of, of_bytes
from ptx.machine import Machine, Run, Warp
from ptx.operands import address, read, reads
from ptx.ops.convert import fitted
from ptx.ops.shared import Function, Maker, nothing
from ptx.parse import Instruction, elements
from ptx.races import NOTHING, joined

PARAMETER = re.compile(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]")


def _ld(m: Machine, i: Instruction) -> Run:
    space = space_of(i.mods)
    if space == "param":
        return _parameter(m, i)
    outs, kind = elements(i.args[0]), i.mods[-1]
    at, size = address(m, i, i.args[1]), SIZES[kind]
    total = size * len(outs)

    def run(w: Warp, mask: Mask | None) -> None:
        data = load(m, w, mask, at(w), total, space, i)
        for n, out in enumerate(outs):
            value = of_bytes(data[:, n * size : (n + 1) * size], DTYPES[kind])
            m.put(w, out, mask, fitted(m, out, value))

    return run


def _parameter(m: Machine, i: Instruction) -> Run:
    match = PARAMETER.match(i.args[1])
    if match is None:
        raise ValueError(i.args[1])
    name, offset = match.group(1), int(match.group(2) or 0)
    outs, kind = elements(i.args[0]), i.mods[-1]
    size = SIZES[kind]

    def run(w: Warp, mask: Mask | None) -> None:
        for n, out in enumerate(outs):
            start = m.offsets[name] + offset + n * size
            value = np.frombuffer(m.parameters[start : start + size], DTYPES[kind])
            m.put(w, out, mask, fitted(m, out, np.repeat(value, LANES)))

    return run


def _st(m: Machine, i: Instruction) -> Run:
    space, kind = space_of(i.mods), i.mods[-1]
    size = SIZES[kind]
    at = address(m, i, i.args[0])
    values = reads(m, i, elements(i.args[1]), {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[size])
    total = size * len(values)

    def run(w: Warp, mask: Mask | None) -> None:
        columns = [bytes_of(v(w)) for v in values]
        data = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        store(m, w, mask, at(w), data, total, space, i)

    return run


ATOMIC: dict[str, Function] = {
    "add": lambda old, new: old + new,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


def _atom(m: Machine, i: Instruction) -> Run:
    """One lane after the other.  Plain accesses to the same bytes race with it unless a barrier orders them;
    so do atomic ones of other warps, whose order decides the bits.

    With acq_rel it hands on what the warp has seen, its own past included, to the warps whose atomics on the
    same address come after it.
    """
    space, kind = space_of(i.mods), i.mods[-1]
    returns = i.name == "atom"
    out, place = (i.args[0], i.args[1]) if returns else ("_", i.args[0])
    function = next(f for name, f in ATOMIC.items() if name in i.mods)
    ordering = "acq_rel" in i.mods
    at, value = address(m, i, place), read(m, i, i.args[2 if returns else 1], kind)

    def run(w: Warp, mask: Mask | None) -> None:
        addresses, values = at(w), value(w)
        before: Array = np.zeros(LANES, DTYPES[kind])
        for lane in range(LANES) if mask is None else np.flatnonzero(mask):
            one = np.zeros(LANES, bool)
            one[lane] = True
            place_of_lane = int(addresses[lane])
            if ordering:
                w.know(joined(w.seen, m.released.get(place_of_lane, NOTHING)), w.fenced)
            old = of_bytes(load(m, w, one, addresses, SIZES[kind], space, i), DTYPES[kind])
            before[lane] = old[lane]
            new = function(old, values).astype(DTYPES[kind])
            store(m, w, one, addresses, bytes_of(new), SIZES[kind], space, i)
            if ordering:
                m.released[place_of_lane] = w.everything()
                w.know(w.seen, w.fenced)  # what it does from now on is not handed on
        if out != "_":
            m.put(w, out, mask, before)

    return run


TABLE: dict[str, Maker] = {
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "atom": _atom,
    "red": _atom,
    "prefetch": nothing,
    "prefetchu": nothing,
    "createpolicy": nothing,
    "applypriority": nothing,
    "discard": nothing,
}
