"""perturb_step in Triton where a ball is one token, or the norm linf: rows in registers, in one launch.

Elements are fp32, a row's sum is fp32 over its lanes.  A row whose squares exceed fp32's range is summed once
more, scaled.  The projection onto an l1 ball takes Newton's steps from 0, as in the reference.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastrl.kernels._launch import launch_options
from fastrl.kernels._perturb import NORM_CODES
from fastrl.kernels._triton._perturb_call import LEAST_NORM, Call, over, shrinkage
from fastrl.kernels._triton._tiles import INFINITY, finite, load_row, store_row, wide

L2, LINF = tl.constexpr(NORM_CODES["l2"]), tl.constexpr(NORM_CODES["linf"])
TILE = 2048  # elements that a program holds: 8 a thread; with 16, an SM has room for one program only
MAX_ROW_IN_REGISTERS = {"l2": 16384, "linf": 16384, "l1": 8192}  # elements
REGISTERS = 128  # without a limit ptxas aims at 64 or less, and spills two
SCALE_DOWN = tl.constexpr(2.0**-80)
SQUARES_BACK = tl.constexpr(2.0**160)  # undoes SCALE_DOWN in a sum of squares


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def squares(x):  # type: ignore[no-untyped-def]
    """The sum of squares of each row in fp64, beyond fp32's range too; not finite where an element is not."""
    s = tl.sum(x * x, 1)
    fits = s < INFINITY
    sums = s.to(tl.float64)
    if tl.min(fits.to(tl.int32), 0) == 0:
        y = x * SCALE_DOWN
        sums = tl.where(fits, sums, tl.sum(y * y, 1).to(tl.float64) * SQUARES_BACK)
    return sums


@triton.jit
def l2_token(x, g, step, radius):  # type: ignore[no-untyped-def]
    gg = squares(g)
    ok = gg < INFINITY
    length = tl.sqrt(tl.where(ok, gg, 0.0))
    # or step / length would be less than fp32 can hold
    scale = tl.where(length > 1e18, 2.0**-80, 1.0).to(tl.float64)
    a = tl.where(length > LEAST_NORM, step / (tl.maximum(length, LEAST_NORM) * scale), 0.0)
    y = x + tl.where(ok[:, None], g * scale.to(tl.float32)[:, None] * a.to(tl.float32)[:, None], 0.0)
    yy = squares(y)
    return y * shrinkage(yy, radius).to(tl.float32)[:, None]


@triton.jit
def linf_token(x, g, step, radius):  # type: ignore[no-untyped-def]
    ok = finite(g)
    sign = tl.where(ok[:, None], (g > 0).to(tl.float32) - (g < 0).to(tl.float32), 0.0)
    r = radius.to(tl.float32)
    return tl.clamp(x + step.to(tl.float32) * sign, -r, r)


@triton.jit
def l1_token(x, g, step, radius):  # type: ignore[no-untyped-def]
    size = tl.abs(g)
    top = tl.where(finite(g), tl.max(size, 1), 0.0)
    chosen = (size == top[:, None]) & (top > LEAST_NORM)[:, None]
    share = (step.to(tl.float32) / tl.maximum(tl.sum(chosen.to(tl.int32), 1), 1).to(tl.float32))[:, None]
    y = x + tl.where(chosen, tl.where(g > 0, share, -share), 0.0)
    size = tl.abs(y)
    f = tl.sum(size, 1).to(tl.float64) - radius
    threshold = tl.zeros_like(f)
    n = tl.sum((size > 0).to(tl.int32), 1)
    i = 0
    while (i < 48) & (tl.max(f, 0) > radius * 2e-7):
        # what is off, the next step sees
        threshold += tl.where(f > 0, f.to(tl.float32) / tl.maximum(n, 1).to(tl.float32), 0.0).to(tl.float64)
        rest = over(size, threshold[:, None])
        f = tl.sum(rest, 1).to(tl.float64) - radius
        n = tl.sum((rest > 0).to(tl.int32), 1)
        i += 1
    f = tl.sum(over(size, threshold[:, None]).to(tl.float64), 1) - radius  # the last step, a whole one
    last = (n > 0) & ((f > 0) | (threshold > 0))
    threshold += tl.where(last, f.to(tl.float32) / tl.maximum(n, 1).to(tl.float32), 0.0).to(tl.float64)
    rest = over(size, threshold[:, None])
    return tl.where(radius == 0.0, 0.0, tl.where(y < 0, -rest, rest))


@triton.jit(do_not_specialize=["T"])
def token_kernel(  # type: ignore[no-untyped-def]
    delta,
    grad,
    mask,
    embeds,
    out,
    T,
    D,
    delta_stride,
    grad_stride,
    embeds_stride,
    out_stride,
    step: tl.float64,
    radius: tl.float64,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = t < T
    live = inside
    if MASKED:
        live = inside & (tl.load(mask + t, inside, 0) != 0)
    x = load_row(delta, t, delta_stride, d, live, D)
    g = load_row(grad, t, grad_stride, d, live, D)
    step, radius = wide(step), wide(radius)
    if NORM == L2:
        y = l2_token(x, g, step, radius)
    elif NORM == LINF:
        y = linf_token(x, g, step, radius)
    else:
        y = l1_token(x, g, step, radius)
    store_row(
        delta,
        embeds,
        out,
        tl.where(live[:, None], y, 0.0),
        t,
        delta_stride,
        embeds_stride,
        out_stride,
        d,
        inside,
        D,
        ADD,
    )


# --- launch -----------------------------------------------------------------------------------------
def by_token(call: Call, norm: str) -> None:
    """Move and project each token, in one launch."""
    T, D = call.delta.shape
    block = max(16, triton.next_power_of_2(D))
    ROWS = rows_at_once(norm, block)
    token_kernel[(triton.cdiv(T, ROWS),)](
        call.delta,
        call.grad,
        call.mask,
        call.embeds,
        call.out,
        T,
        D,
        *call.strides,
        call.step,
        call.radius,
        NORM=NORM_CODES[norm],
        MASKED=call.masked,
        ADD=call.add,
        ROWS=ROWS,
        BLOCK=block,
        **options(norm, block),
    )


def fits(norm: str, width: int) -> bool:
    """Whether a row of `width` elements stays in registers."""
    return width <= MAX_ROW_IN_REGISTERS[norm]


def rows_at_once(norm: str, block: int) -> int:
    """Rows of `block` columns that a program holds."""
    elements = TILE // 2 if norm == "l1" else TILE  # l1 with two rows of 1024 spills two registers
    return max(1, elements // block)


def options(norm: str, block: int) -> dict[str, Any]:
    """Options for rows of `block` columns in registers."""
    limit = {"maxnreg": REGISTERS} if norm == "l1" else {}
    return launch_options(num_warps=8 if block <= 4096 else 16, **limit)
