"""mov between registers, and the conversions of addresses."""

from __future__ import annotations

import numpy as np

from ptx.formats import RAW, SIZES, Mask, bytes_of, of_bytes
from ptx.machine import Machine, Run, Warp
from ptx.memory import WINDOW, WINDOW_SIZE
from ptx.operands import read, reads
from ptx.ops.shared import Maker, apply
from ptx.parse import Instruction, elements

BASE, STEP = np.uint64(WINDOW), np.uint64(WINDOW_SIZE)
OF_SIZE = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def _mov(m: Machine, i: Instruction) -> Run:
    kind, (to, source) = i.mods[-1], i.args
    if to.startswith("{"):
        return _unpack(m, i, kind)
    if source.startswith("{"):
        return _pack(m, i, kind)
    return apply(m, i, [kind], lambda x: x)


def _unpack(m: Machine, i: Instruction, kind: str) -> Run:
    outs, value = elements(i.args[0]), read(m, i, i.args[1], kind)
    size = SIZES[kind] // len(outs)

    def run(w: Warp, mask: Mask | None) -> None:
        data = bytes_of(value(w))
        for n, out in enumerate(outs):
            if out != "_":
                m.put(w, out, mask, of_bytes(data[:, n * size : (n + 1) * size], RAW[size]))

    return run


def _pack(m: Machine, i: Instruction, kind: str) -> Run:
    parts = elements(i.args[1])
    size = SIZES[kind] // len(parts)
    values = reads(m, i, parts, OF_SIZE[size])

    def run(w: Warp, mask: Mask | None) -> None:
        data = np.concatenate([bytes_of(v(w)) for v in values], axis=1)
        m.put(w, i.args[0], mask, of_bytes(data, RAW[SIZES[kind]]))

    return run


def _cvta(m: Machine, i: Instruction) -> Run:
    """Between generic addresses and those of a space; global ones are the same in both."""
    value = read(m, i, i.args[1], "u64")
    shared = any(x.startswith("shared") for x in i.mods)

    def run(w: Warp, mask: Mask | None) -> None:
        x = value(w)
        if shared and "to" in i.mods:
            x = (x - BASE) % STEP
        elif "param" in i.mods:
            pass  # one space here
        elif shared:
            x = x + BASE + np.uint64(w.block.rank) * STEP
        m.put(w, i.args[0], mask, x)

    return run


def _mapa(m: Machine, i: Instruction) -> Run:
    """The address that a block of the cluster has for the same place."""
    kind = i.mods[-1]
    value, rank = read(m, i, i.args[1], kind), read(m, i, i.args[2], "u32")

    def run(w: Warp, mask: Mask | None) -> None:
        x, r = value(w), rank(w)
        if kind == "u64":
            out = BASE + r.astype(np.uint64) * STEP + (x - BASE) % STEP
        else:
            out = ((r + np.uint32(1)) << np.uint32(24)) | (x & np.uint32(WINDOW_SIZE - 1))
        m.put(w, i.args[0], mask, out)

    return run


TABLE: dict[str, Maker] = {"mov": _mov, "cvta": _cvta, "mapa": _mapa}
