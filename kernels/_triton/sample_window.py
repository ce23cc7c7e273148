"""Where the floor under sample's filters lies, roughly: one read of the logits, in Triton.

`survey_kernel` leaves, per chunk of a row, the largest logit, and the mass (and the number) of the tokens
above each of 15 edges; a chunk is 64 KB at most, and its second loop finds it in the L1 cache.  Edges lie on
a grid of SPACING bits of probability that is the same in all chunks, so the chunks of a row add up.
`window` is then the stretch between two edges in which the floor lies.

The sums are fp32, their edges are rounded: what follows from a window is checked by exact sums before it is
believed (sample_floor.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrl.kernels._triton._race import LOG2E, LOWEST

EDGES = tl.constexpr(16)  # the last is below every logit
SPACING = tl.constexpr(1.5)  # bits: 15 edges reach 21 bits down, a 3-millionth of the largest probability
DOUBT = tl.constexpr(1e-3)  # of the limit: far more than fp32 sums of a row are off by


@triton.jit
def survey_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    tops,
    masses,
    counts,
    V,
    stride,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    READ: tl.constexpr,
):
    """The largest logit, and the mass and the number of tokens above each edge, of one chunk."""
    chunks = tl.cdiv(V, CHUNK)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    start = (pid % chunks) * CHUNK
    end = tl.minimum(start + CHUNK, V)
    row = logits + b * stride
    wide = tl.arange(0, READ)
    high = tl.full((READ,), LOWEST, tl.float32)
    for v in range(start, end, READ):
        high = tl.maximum(high, tl.load(row + v + wide, v + wide < V, float("-inf")).to(tl.float32))
    top = tl.max(high, 0)
    tl.store(tops + pid, top)
    if MASS or COUNT:
        unit = steps_of(tl.load(temperature + b))
        grid = tl.floor(top * unit)
        lane, edge = tl.arange(0, BLOCK), tl.arange(0, EDGES)
        least = tl.where(edge < EDGES - 1, grid - edge.to(tl.float32), float("-inf"))[:, None]
        mass = tl.zeros((EDGES, BLOCK), tl.float32)
        count = tl.zeros((EDGES, BLOCK), tl.float32)
        for v in range(start, end, BLOCK):
            x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32) * unit
            above = x[None, :] >= least
            if MASS:
                share = tl.exp2((x - grid) * SPACING)
                mass = tl.where(above, mass + share[None, :], mass)
            if COUNT:
                count = tl.where(above, count + 1, count)
        at = pid.to(tl.int64) * EDGES + edge
        if MASS:
            tl.store(masses + at, tl.sum(mass, 1))
        if COUNT:
            tl.store(counts + at, tl.sum(count, 1))


@triton.jit
def steps_of(tau):  # type: ignore[no-untyped-def]
    """Steps of the grid per unit of a logit; temperature 0 counts as 1."""
    return LOG2E / (SPACING * tl.where(tau == 0, 1.0, tau))


@triton.jit
def window(  # type: ignore[no-untyped-def]
    tops,
    masses,
    counts,
    tau,
    b,
    chunks,
    top_k,
    p,
    MASS: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The largest logit of row b, the d from which on a token is surely kept, and the one below which it is
    surely filtered out, unless `survey_kernel`'s sums mislead.
    """
    lane, edge = tl.arange(0, CHUNKS), tl.arange(0, EDGES)
    at = b * chunks + lane
    chunk_top = tl.load(tops + at, lane < chunks, LOWEST)
    top = tl.max(chunk_top, 0)
    high = tl.full((), float("inf"), tl.float32)
    low = tl.full((), float("-inf"), tl.float32)
    if MASS or COUNT:
        unit = steps_of(tau)
        grid = tl.floor(top * unit)
        behind = grid - tl.floor(chunk_top * unit)
        own = edge[:, None] - tl.minimum(behind, 16.0).to(tl.int32)[None, :]
        own = tl.where(edge[:, None] == EDGES - 1, EDGES - 1, own)
        live = (own >= 0) & (lane < chunks)[None, :]
        place = at[None, :] * EDGES + tl.maximum(own, 0)
        lower = tl.full((), 0, tl.int32)
        upper = lower
        least = p
        if COUNT:
            n = tl.sum(tl.load(counts + place, live, 0.0), 1)
            lower = tl.sum((n < top_k).to(tl.int32), 0)
            upper = lower
        if MASS:
            held = tl.load(masses + place, live, 0.0) * tl.exp2(-behind * SPACING)[None, :]
            s = tl.sum(held, 1)
            if COUNT:  # what top_k leaves is at least what lies above its own window
                least = p * tl.sum(tl.where(edge == lower - 1, s, 0.0), 0)
            else:
                least = p * tl.sum(tl.where(edge == EDGES - 1, s, 0.0), 0)
                lower = tl.sum((s < least * (1 + DOUBT)).to(tl.int32), 0)
            upper = tl.sum((s < least * (1 - DOUBT)).to(tl.int32), 0)
        # a logit's place on the grid is rounded twice, here and in the survey
        reach = top * unit
        blur = (tl.abs(reach) + 32) * 2e-6
        high = tl.where(
            upper == 0, high, ((grid - reach) - upper.to(tl.float32) + 1 + blur) * (SPACING / LOG2E)
        )
        low = tl.where(
            lower >= EDGES - 1, low, ((grid - reach) - lower.to(tl.float32) - blur) * (SPACING / LOG2E)
        )
    return top, high, low
