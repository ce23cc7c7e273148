"""The floor of a row under sample's filters by its definition, the fp64 mass of every token, in Triton.

A logit is mapped to an unsigned integer of the same order.  The largest integer with enough at or above it
(top_k tokens, or top_p of the mass) is found three bits at a time: a pass adds up what lies at or above each
of eight thresholds, and the digit is how many of them have enough.  fp32 takes 11 passes, bf16 6, fp16 7, for
any row.  This is what sample_floor.py falls back to.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """fp32 as uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def logit(key, STOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 number that `ordered` maps to `key`."""
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key)
    return ((bits >> STOP) << STOP).to(tl.float32, bitcast=True)


@triton.jit
def exact_mass(x, top, tau, among, bits):  # type: ignore[no-untyped-def]
    """The integer mass of each token that is not below `among`."""
    d = tl.div_rn(x - top, tau)
    scale = (tl.full((), 1, tl.int64) << bits).to(tl.float64)
    return tl.where(d >= among, tl.exp(d.to(tl.float64)) * scale, 0.0).to(tl.int64)


@triton.jit
def threshold(  # type: ignore[no-untyped-def]
    row, V, limit, top, tau, among, bits, MASS: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key with at least `limit` at or above it: by count of logits, or by MASS."""
    lane = tl.arange(0, BLOCK)[None, :]
    step = tl.arange(0, 8)[:, None].to(tl.uint32)
    found = tl.full((), 0, tl.uint32)
    for i in range((34 - STOP) // 3):
        shift = tl.maximum(29 - 3 * i, STOP)
        least = found + (step << shift)
        above = tl.zeros((8, BLOCK), tl.int64 if MASS else tl.int32)
        for v in range(0, V, BLOCK):
            x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
            weight = exact_mass(x, top, tau, among, bits) if MASS else 1
            above += tl.where(ordered(x) >= least, weight, 0)
        enough = tl.sum((tl.sum(above, 1) >= limit).to(tl.int32), 0)
        found += (tl.maximum(enough, 1) - 1).to(tl.uint32) << shift
    return logit(found, STOP)


@triton.jit
def exact_floor(  # type: ignore[no-untyped-def]
    row,
    V,
    top,
    tau,
    top_k,
    top_p,
    bits,
    COUNT: tl.constexpr,
    MASS: tl.constexpr,
    STOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The d below which the tokens of a row are filtered out by top_k and top_p, the bits of a double."""
    among = tl.full((), float("-inf"), tl.float32)
    if COUNT:
        among = tl.div_rn(threshold(row, V, top_k, top, tau, among, bits, False, STOP, BLOCK) - top, tau)
    floor = among
    if MASS:
        lane = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.int64)
        for v in range(0, V, BLOCK):
            x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
            total += exact_mass(x, top, tau, among, bits)
        limit = limit_of(top_p, tl.sum(total, 0))
        x = threshold(row, V, limit, top, tau, among, bits, True, STOP, BLOCK)
        floor = tl.maximum(among, tl.div_rn(x - top, tau))
    return floor


@triton.jit
def limit_of(top_p, total):  # type: ignore[no-untyped-def]
    """The mass that a row may keep, at least 1; top_p is the bits of a double."""
    part = top_p.to(tl.float64, bitcast=True) * total.to(tl.float64)
    return tl.maximum(part.to(tl.int64), 1)
