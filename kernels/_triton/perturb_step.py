"""perturb_step in Triton: l2 balls of many tokens, and rows of linf that do not fit in registers.

Other rows of linf, and balls of one token, are in perturb_token.py; l1 balls of many tokens in perturb_l1.py.
An l2 ball takes two launches:

    sums   per tile of tokens: |g|^2, <delta, g> and |delta|^2, from one read of both, and which tokens have a
           finite gradient
    step   every program adds up its ball's tiles, always in the same order, and knows the length after the
           step before it takes it:
           |delta + a g|^2 = |delta|^2 + 2 a <delta, g> + a^2 |g|^2  with a = step_size / |g|

The length is known only when all of a ball has been read, so delta and its gradient are read twice: with a
bf16 gradient 6 + 6 bytes an element, and 4 written.  A ball of 4096 x 4096 is 96 MB, more than the 30 MB of
shared memory or the 50 MB of L2 of an H200 hold: 16 bytes an element have to pass, 0.50 ms for 8 of them at
4.3 TB/s.  What fits in L2 (512 x 1024 is 3 MB, 8 of them 25) is read from memory once, 10 bytes; `step` goes
through the tiles backwards, so that of a larger call the last 50 MB are, too.

Elements are fp32, a row's sum is fp32 over BLOCK lanes, sums of rows are fp64.  A row whose squares exceed
fp32's range is summed once more, scaled.  A tile never crosses from one ball into the next: in packed
sequences ball u owns the tiles from cu[u] // R + u on, so that the host counts nothing.  All sizes are
runtime values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device
from fastrl.kernels._perturb import NORM_CODES, ball, bytes_of, rows, write_back
from fastrl.kernels._triton import perturb_l1, perturb_token
from fastrl.kernels._triton._perturb_call import LEAST_NORM, Call, shrinkage
from fastrl.kernels._triton._tiles import INFINITY, Tiles, find_tile, load_row, store_row, total, wide

DTYPES = (torch.float32,)
L2 = tl.constexpr(NORM_CODES["l2"])
TILE, BLOCK = 2048, 1024  # elements of a step of a loop, and of a row in it
OPTIONS = launch_options(num_warps=8)
OPTIONS_128_REGISTERS = launch_options(
    num_warps=8, maxnreg=128
)  # without it ptxas aims at 64 or less, and spills two


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    delta,
    grad,
    t,
    live,
    D,
    delta_stride,
    grad_stride,
    d_scale,
    g_scale,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """|g|^2, <delta, g>, |delta|^2 of each row, of the scaled numbers."""
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros((ROWS, BLOCK), tl.float32)
    dg = tl.zeros((ROWS, BLOCK), tl.float32)
    dd = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, D, BLOCK):
        x = load_row(delta, t, delta_stride, i + lane, live, D)
        g = load_row(grad, t, grad_stride, i + lane, live, D)
        if SCALED:
            x, g = x * d_scale[:, None], g * g_scale[:, None]
        gg += g * g
        dg += x * g
        dd += x * x
    return tl.sum(gg, 1), tl.sum(dg, 1), tl.sum(dd, 1)


@triton.jit(do_not_specialize=["S", "L", "T", "R", "tiles"])
def sums_kernel(  # type: ignore[no-untyped-def]
    delta,
    grad,
    mask,
    cu,
    partial,
    usable,
    S,
    L,
    T,
    R,
    tiles,
    D,
    delta_stride,
    grad_stride,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    _, _, _, begin, end = find_tile(p, cu, S, L, T, R, PACKED)
    one = tl.full((ROWS,), 1.0, tl.float32)
    gg = tl.zeros((ROWS,), tl.float64)
    dg = tl.zeros((ROWS,), tl.float64)
    dd = tl.zeros((ROWS,), tl.float64)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = t < end
        live = inside
        if MASKED:
            live = inside & (tl.load(mask + t, inside, 0) != 0)
        a, b, c = row_sums(delta, grad, t, live, D, delta_stride, grad_stride, one, one, False, ROWS, BLOCK)
        g_scale, d_scale = one, one
        if tl.min(((a < INFINITY) & (c < INFINITY)).to(tl.int32), 0) == 0:
            g_scale = tl.where(a < INFINITY, 1.0, 2.0**-80)
            d_scale = tl.where(c < INFINITY, 1.0, 2.0**-80)
            a, b, c = row_sums(
                delta, grad, t, live, D, delta_stride, grad_stride, d_scale, g_scale, True, ROWS, BLOCK
            )
        ok = a < INFINITY
        tl.store(usable + t, (ok & live).to(tl.uint8), inside)
        g_back, d_back = 1.0 / g_scale.to(tl.float64), 1.0 / d_scale.to(tl.float64)
        gg += tl.where(ok, a.to(tl.float64) * g_back * g_back, 0.0)
        dg += tl.where(ok, b.to(tl.float64) * g_back * d_back, 0.0)
        dd += c.to(tl.float64) * d_back * d_back
    tl.store(partial + p, tl.sum(gg, 0))
    tl.store(partial + tiles + p, tl.sum(dg, 0))
    tl.store(partial + 2 * tiles + p, tl.sum(dd, 0))


@triton.jit(do_not_specialize=["S", "L", "T", "R", "tiles"])
def step_kernel(  # type: ignore[no-untyped-def]
    delta,
    grad,
    mask,
    cu,
    partial,
    usable,
    embeds,
    out,
    S,
    L,
    T,
    R,
    tiles,
    D,
    delta_stride,
    grad_stride,
    embeds_stride,
    out_stride,
    step: tl.float64,
    radius: tl.float64,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # the tiles that `sums` read last come first: they are still in the cache
    _, own, many, begin, end = find_tile(tiles - 1 - tl.program_id(0), cu, S, L, T, R, PACKED)
    step, radius = wide(step), wide(radius)
    if NORM == L2:
        gg, dg = total(partial, own, many), total(partial + tiles, own, many)
        length = tl.sqrt(gg)
        a = tl.where(length > LEAST_NORM, step / tl.maximum(length, LEAST_NORM), 0.0)
        yy = total(partial + 2 * tiles, own, many) + 2.0 * a * dg + a * a * gg
        factor = shrinkage(yy, radius)
        factor = tl.where(radius == 0.0, 0.0, factor).to(tl.float32)
        scale = tl.where(length > 1e18, 2.0**-80, 1.0).to(tl.float64)
        a = (a / scale).to(tl.float32)
        small = scale.to(tl.float32)
    r, s = radius.to(tl.float32), step.to(tl.float32)
    lane = tl.arange(0, BLOCK)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        inside = t < end
        use = tl.load(usable + t, inside, 0) != 0
        live = inside
        if MASKED:
            live = inside & (tl.load(mask + t, inside, 0) != 0)
        for i in range(0, D, BLOCK):
            d = i + lane
            x = load_row(delta, t, delta_stride, d, live, D)
            g = load_row(grad, t, grad_stride, d, use, D)
            if NORM == L2:
                y = (x + g * small * a) * factor
            else:
                y = tl.clamp(x + s * ((g > 0).to(tl.float32) - (g < 0).to(tl.float32)), -r, r)
            store_row(delta, embeds, out, y, t, delta_stride, embeds_stride, out_stride, d, inside, D, ADD)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    delta: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    step_size: float,
    radius: float,
    norm: str,
    scope: str,
    embeds: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Move `delta` in place; write embeds + delta to `out` where they are given."""
    if not delta.numel():
        return
    delta_rows = rows(delta)
    out_rows = delta_rows if out is None else rows(out)
    call = Call(
        delta=delta_rows,
        grad=rows(grad),
        mask=bytes_of(mask) if mask.numel() else delta_rows,
        embeds=delta_rows if embeds is None else rows(embeds),
        out=delta_rows if embeds is None else out_rows,
        step=step_size,
        radius=radius,
        masked=mask.numel() > 0,
        add=embeds is not None,
    )
    T, D = delta_rows.shape
    alone = scope == "token" or norm == "linf"
    with on_device(delta_rows):
        if alone and perturb_token.fits(norm, D):
            perturb_token.by_token(call, norm)
        else:
            S, L = ball(delta, cu_seqlens, scope)
            tiles = Tiles.over(T, S, L, cu_seqlens, shape(D)[0])
            by_ball = perturb_l1.by_ball if norm == "l1" else _by_ball
            by_ball(call, tiles, NORM_CODES[norm])
    write_back(delta_rows, delta)
    if out is not None:
        write_back(out_rows, out)


def _by_ball(call: Call, tiles: Tiles, norm: int) -> None:
    T, D = call.delta.shape
    partial = torch.empty(3 * tiles.programs, dtype=torch.float64, device=call.delta.device)
    usable = torch.empty(T, dtype=torch.uint8, device=call.delta.device)
    inputs = (call.delta, call.grad, call.mask, tiles.cu, partial, usable)

    ROWS, block = shape(D)
    flags: dict[str, Any] = {"MASKED": call.masked, "PACKED": tiles.packed, "ROWS": ROWS, "BLOCK": block}
    sums_kernel[(tiles.programs,)](*inputs, *tiles.numbers, D, *call.strides[:2], **flags, **OPTIONS)
    step_kernel[(tiles.programs,)](
        *inputs,
        call.embeds,
        call.out,
        *tiles.numbers,
        D,
        *call.strides,
        call.step,
        call.radius,
        NORM=norm,
        ADD=call.add,
        **flags,
        **OPTIONS_128_REGISTERS,
    )


def shape(D: int) -> tuple[int, int]:
    """Rows and columns that a step of a loop takes at once."""
    block = min(BLOCK, max(16, triton.next_power_of_2(D)))
    return TILE // block, block
