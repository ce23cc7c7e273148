"""perturb_step in Triton for an l1 ball of many tokens: the steepest direction is the largest gradients, the
projection a soft threshold x.

    f(x) = sum max(|delta| - x, 0) - radius = 0
    f is convex, falls, and is linear between neighbouring |delta|

8 passes over delta fix 4 bits of the threshold each, by f at 15 numbers at once (the bits of fp32 are ordered
as the numbers are).  One exact step follows from the largest fp32 number with f > 0, where the same elements
are above the threshold as at the root.  The host waits for nothing, and the number of launches is fixed.

A threshold is fp64, subtracted as two fp32 parts: |delta| - x keeps its digits where the two are close.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastrl.kernels._launch import launch_options
from fastrl.kernels._triton._perturb_call import LEAST_NORM, Call, over
from fastrl.kernels._triton._tiles import (
    INFINITY,
    TILES_AT_ONCE,
    Tiles,
    find_ball,
    find_tile,
    load_row,
    store_row,
    total,
    wide,
)

TILE, BLOCK = 2048, 1024
NARROW = 512  # elements compared with 16 numbers at once
BITS = 4
PROBED_AT_ONCE = 128  # tiles whose 16 sums a program adds up at once
PROBES = tl.constexpr(16)
OPTIONS = launch_options(num_warps=8)
PROBING = launch_options(num_warps=4)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["S", "L", "T", "R"])
def largest_kernel(  # type: ignore[no-untyped-def]
    grad,
    mask,
    cu,
    top,
    ties,
    usable,
    S,
    L,
    T,
    R,
    D,
    grad_stride,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per tile: the largest |g| of its finite rows, and how often it occurs."""
    p = tl.program_id(0)
    _, _, _, begin, end = find_tile(p, cu, S, L, T, R, PACKED)
    lane = tl.arange(0, BLOCK)
    high = tl.zeros((ROWS,), tl.float32)
    many = tl.zeros((ROWS,), tl.int64)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = t < end
        live = inside
        if MASKED:
            live = inside & (tl.load(mask + t, inside, 0) != 0)
        m = tl.zeros((ROWS, BLOCK), tl.float32)
        n = tl.zeros((ROWS, BLOCK), tl.int32)
        ok = tl.full((ROWS, BLOCK), 1, tl.int32)
        for i in range(0, D, BLOCK):
            size = tl.abs(load_row(grad, t, grad_stride, i + lane, live, D))
            n = tl.where(size > m, 1, n + (size == m).to(tl.int32))
            m = tl.maximum(m, size)
            ok &= (size < INFINITY).to(tl.int32)
        ok_rows = live & (tl.min(ok, 1) != 0)
        tl.store(usable + t, ok_rows.to(tl.uint8), inside)
        row = tl.where(ok_rows, tl.max(m, 1), 0.0)
        n_row = tl.sum(tl.where(m == row[:, None], n, 0), 1).to(tl.int64)
        many = tl.where(row > high, n_row, many + tl.where(row == high, n_row, 0))
        high = tl.maximum(high, row)
    best = tl.max(high, 0)
    tl.store(top + p, best)
    tl.store(ties + p, tl.sum(tl.where(high == best, many, 0), 0))


@triton.jit
def largest(top, ties, own, many):  # type: ignore[no-untyped-def]
    """The largest |g| of a ball, and how often it occurs."""
    lane = tl.arange(0, TILES_AT_ONCE)
    high = tl.zeros((TILES_AT_ONCE,), tl.float32)
    n = tl.zeros((TILES_AT_ONCE,), tl.int64)
    for i in range(0, many, TILES_AT_ONCE):
        at = own + i + lane
        m = tl.load(top + at, i + lane < many, 0.0)
        k = tl.load(ties + at, i + lane < many, 0)
        n = tl.where(m > high, k, n + tl.where(m == high, k, 0))
        high = tl.maximum(high, m)
    best = tl.max(high, 0)
    return best, tl.sum(tl.where(high == best, n, 0), 0)


@triton.jit(do_not_specialize=["S", "L", "T", "R"])
def move_kernel(  # type: ignore[no-untyped-def]
    delta,
    grad,
    mask,
    cu,
    top,
    ties,
    usable,
    S,
    L,
    T,
    R,
    D,
    delta_stride,
    grad_stride,
    step: tl.float64,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta after the step, not yet projected."""
    _, own, many, begin, end = find_tile(tl.program_id(0), cu, S, L, T, R, PACKED)
    best, n = largest(top, ties, own, many)
    share = tl.where(best > LEAST_NORM, wide(step) / tl.maximum(n, 1).to(tl.float64), 0.0).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = t < end
        use = tl.load(usable + t, inside, 0) != 0
        live = inside
        if MASKED:
            live = inside & (tl.load(mask + t, inside, 0) != 0)
        for i in range(0, D, BLOCK):
            x = load_row(delta, t, delta_stride, i + lane, live, D)
            g = load_row(grad, t, grad_stride, i + lane, use, D)
            y = x + tl.where(tl.abs(g) == best, tl.where(g > 0, share, -share), 0.0)
            store_row(
                delta,
                delta,
                delta,
                y,
                t,
                delta_stride,
                delta_stride,
                delta_stride,
                i + lane,
                inside,
                D,
                False,
            )


@triton.jit(do_not_specialize=["S", "L", "T", "R", "shift"])
def probe_kernel(  # type: ignore[no-untyped-def]
    delta, cu, low, partial, S, L, T, R, D, delta_stride, shift, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Per tile: sum max(|delta| - x, 0) at 16 numbers x, `shift` bits apart."""
    p = tl.program_id(0)
    u, _, _, begin, end = find_tile(p, cu, S, L, T, R, PACKED)
    j = tl.arange(0, PROBES)
    bits = tl.where(shift == 28, 0, tl.load(low + u, shift != 28, 0)) + (j << shift)
    # bit 31 is the sign: nothing is above infinity
    x = tl.where(bits >= 0, bits, 0x7F800000).to(tl.float32, bitcast=True)
    x = tl.where(x < INFINITY, x, INFINITY)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((PROBES,), tl.float64)
    for t in range(begin, end):
        row = tl.zeros((BLOCK, PROBES), tl.float32)
        for i in range(0, D, BLOCK):
            size = tl.abs(tl.load(delta + t * delta_stride + i + lane, i + lane < D, 0.0))
            row += tl.maximum(size[:, None] - x[None, :], 0.0)
        sums += tl.sum(row, 0).to(tl.float64)
    tl.store(partial + p.to(tl.int64) * PROBES + j, sums)


@triton.jit(do_not_specialize=["L", "R", "shift"])
def combine_probes_kernel(  # type: ignore[no-untyped-def]
    cu, low, partial, L, R, shift, radius: tl.float64, PACKED: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Per ball: `shift`'s bits of the largest number with f > 0."""
    u = tl.program_id(0)
    own, many, _, _ = find_ball(u, cu, L, R, PACKED)
    j = tl.arange(0, PROBES)
    lane = tl.arange(0, AT_ONCE)
    s = tl.zeros((AT_ONCE, PROBES), tl.float64)
    for i in range(0, many, AT_ONCE):
        at = (own + i + lane).to(tl.int64)
        s += tl.load(partial + at[:, None] * PROBES + j[None, :], (i + lane < many)[:, None], 0.0)
    above = (tl.sum(s, 0) > wide(radius)) & (j > 0)
    known = tl.where(shift == 28, 0, tl.load(low + u, shift != 28, 0))
    tl.debug_barrier()  # every warp has read the bits that one of them replaces
    tl.store(low + u, known + (tl.sum(above.to(tl.int32), 0) << shift))


@triton.jit(do_not_specialize=["S", "L", "T", "R", "tiles"])
def excess_kernel(  # type: ignore[no-untyped-def]
    delta,
    cu,
    low,
    partial,
    S,
    L,
    T,
    R,
    tiles,
    D,
    delta_stride,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per tile: sum max(|delta| - x, 0), and the number of |delta| > x, at what the passes found."""
    p = tl.program_id(0)
    u, _, _, begin, end = find_tile(p, cu, S, L, T, R, PACKED)
    x = tl.load(low + u).to(tl.float32, bitcast=True)
    lane = tl.arange(0, BLOCK)
    s = tl.zeros((ROWS,), tl.float64)
    n = tl.zeros((ROWS,), tl.int64)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        row = tl.zeros((ROWS, BLOCK), tl.float32)
        count = tl.zeros((ROWS, BLOCK), tl.int32)
        for i in range(0, D, BLOCK):
            rest = tl.abs(load_row(delta, t, delta_stride, i + lane, t < end, D)) - x
            row += tl.maximum(rest, 0.0)
            count += (rest > 0).to(tl.int32)
        s += tl.sum(row, 1).to(tl.float64)
        n += tl.sum(count, 1).to(tl.int64)
    tl.store(partial + p, tl.sum(s, 0))
    tl.store(partial + tiles + p, tl.sum(n, 0).to(tl.float64))


@triton.jit(do_not_specialize=["S", "L", "T", "R", "tiles"])
def shrink_kernel(  # type: ignore[no-untyped-def]
    delta,
    cu,
    low,
    partial,
    embeds,
    out,
    S,
    L,
    T,
    R,
    tiles,
    D,
    delta_stride,
    embeds_stride,
    out_stride,
    radius: tl.float64,
    PACKED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The exact step, and the soft threshold."""
    u, own, many, begin, end = find_tile(tl.program_id(0), cu, S, L, T, R, PACKED)
    radius = wide(radius)
    x = tl.load(low + u).to(tl.float32, bitcast=True).to(tl.float64)
    f, n = total(partial, own, many) - radius, total(partial + tiles, own, many)
    x += tl.where((n > 0) & ((x > 0) | (f > 0)), f / tl.maximum(n, 1.0), 0.0)
    lane = tl.arange(0, BLOCK)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = t < end
        for i in range(0, D, BLOCK):
            y = load_row(delta, t, delta_stride, i + lane, inside, D)
            rest = over(tl.abs(y), x)
            y = tl.where(radius == 0.0, 0.0, tl.where(y < 0, -rest, rest))
            store_row(
                delta, embeds, out, y, t, delta_stride, embeds_stride, out_stride, i + lane, inside, D, ADD
            )


# --- launch -----------------------------------------------------------------------------------------
def by_ball(call: Call, tiles: Tiles, norm: int) -> None:
    """Move and project each ball."""
    delta, grad, programs = call.delta, call.grad, tiles.programs
    T, D = delta.shape
    device = delta.device
    top = torch.empty(programs, dtype=torch.float32, device=device)
    ties = torch.empty(programs, dtype=torch.int64, device=device)
    usable = torch.empty(T, dtype=torch.uint8, device=device)
    low = torch.empty(tiles.S, dtype=torch.int32, device=device)
    partial = torch.empty(16 * programs, dtype=torch.float64, device=device)

    block = min(BLOCK, max(16, triton.next_power_of_2(D)))
    packed: dict[str, Any] = {"PACKED": tiles.packed}
    wide = packed | {"ROWS": TILE // block, "BLOCK": block} | OPTIONS
    masked = wide | {"MASKED": call.masked}
    delta_stride, grad_stride, embeds_stride, out_stride = call.strides
    ends = tiles.numbers[:4]

    gradients = (call.mask, tiles.cu, top, ties, usable, *ends, D)
    largest_kernel[(programs,)](grad, *gradients, grad_stride, **masked)
    move_kernel[(programs,)](delta, grad, *gradients, delta_stride, grad_stride, call.step, **masked)

    narrow = packed | {"BLOCK": min(NARROW, block)} | PROBING
    combining = packed | {"AT_ONCE": PROBED_AT_ONCE} | PROBING
    found = (tiles.cu, low, partial)
    for shift in range(32 - BITS, -1, -BITS):
        probe_kernel[(programs,)](delta, *found, *ends, D, delta_stride, shift, **narrow)
        combine_probes_kernel[(tiles.S,)](*found, tiles.L, tiles.R, shift, call.radius, **combining)

    excess_kernel[(programs,)](delta, *found, *tiles.numbers, D, delta_stride, **wide)
    shrink_kernel[(programs,)](
        delta,
        *found,
        call.embeds,
        call.out,
        *tiles.numbers,
        D,
        delta_stride,
        embeds_stride,
        out_stride,
        call.radius,
        ADD=call.add,
        **wide,
    )
