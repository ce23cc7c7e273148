"""perturb_step in Triton.  A ball that is one token fits in a program: one launch.  A larger l2 ball takes
two,

    sums   per tile of tokens: |g|^2, <delta, g> and |delta|^2, from one read of both, and which tokens have a
           finite gradient
    step   every program adds up its ball's tiles, always in the same order, and knows the length after the
           step before it takes it: |delta + a g|^2 = |delta|^2 + 2 a <delta, g> + a^2 |g|^2     with a =
           step_size / |g|

linf needs no sums: one launch.  A larger l1 ball is in _perturb_l1_triton.py.

Elements are fp32, a row's sum is fp32 over BLOCK lanes, sums of rows are fp64.  A row whose squares leave
fp32's range is summed once more, scaled.  A tile never crosses from one ball into the next: ball u owns the
tiles from cu[u] // R + u on, for packed sequences, so that nobody has to count.  All sizes are runtime
values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import TRITON_TYPES, Spec, on_device
from fastrl.kernels._perturb import NORM_CODES, TINY, ball, bytes_of, rows, write_back
from fastrl.kernels._triton import perturb_l1 as l1
from fastrl.kernels._triton._tiles import (
    BIG,
    INFINITY,
    Tiles,
    find_tile,
    finite,
    load_row,
    store_row,
    total,
    wide,
)

DTYPES = (torch.float32,)
L2, LINF = tl.constexpr(0), tl.constexpr(1)
TILE, BLOCK = 2048, 1024  # elements of a step of a loop, and of a row in it
WHOLE = {"l2": 16384, "linf": 16384, "l1": 8192}  # the longest row that stays in registers
# 8 elements a thread: with 16, one program is all that an SM has room for
OPTIONS = {
    "num_warps": 8,
    "enable_fp_fusion": True,
}
ROOM = OPTIONS | {"maxnreg": 128}  # or ptxas aims at 64, and less on sm_100, and spills two
SMALL = tl.constexpr(2.0**-80)
LEAST = tl.constexpr(TINY)


# --- one token --------------------------------------------------------------------------------------
@triton.jit
def squares(x):  # type: ignore[no-untyped-def]
    """The sum of squares of each row in fp64, beyond fp32's range too; not finite where an element is not."""
    s = tl.sum(x * x, 1)
    fits = s < INFINITY
    sums = s.to(tl.float64)
    if tl.min(fits.to(tl.int32), 0) == 0:
        y = x * SMALL
        sums = tl.where(fits, sums, tl.sum(y * y, 1).to(tl.float64) * BIG)
    return sums


@triton.jit
def shrinkage(yy, radius):  # type: ignore[no-untyped-def]
    """radius / sqrt(yy) where that is less than 1."""
    return tl.where(yy > radius * radius, radius / tl.sqrt(tl.maximum(yy, 1e-300)), 1.0)


@triton.jit
def l2_token(x, g, step, radius):  # type: ignore[no-untyped-def]
    gg = squares(g)
    ok = gg < INFINITY
    length = tl.sqrt(tl.where(ok, gg, 0.0))
    # or step / length would be less than fp32 can hold
    scale = tl.where(length > 1e18, 2.0**-80, 1.0).to(tl.float64)
    a = tl.where(length > LEAST, step / (tl.maximum(length, LEAST) * scale), 0.0)
    y = x + tl.where(ok[:, None], g * scale.to(tl.float32)[:, None] * a.to(tl.float32)[:, None], 0.0)
    yy = squares(y)
    return y * shrinkage(yy, radius).to(tl.float32)[:, None]


@triton.jit
def linf_token(x, g, step, radius):  # type: ignore[no-untyped-def]
    ok = finite(g)
    sign = tl.where(ok[:, None], (g > 0).to(tl.float32) - (g < 0).to(tl.float32), 0.0)
    r = radius.to(tl.float32)
    return tl.clamp(x + step.to(tl.float32) * sign, -r, r)


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
        y = l1.l1_token(x, g, step, radius)
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


# --- a ball of many tokens --------------------------------------------------------------------------
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
    _, own, many, begin, end = find_tile(tl.program_id(0), cu, S, L, T, R, PACKED)
    step, radius = wide(step), wide(radius)
    if NORM == L2:
        gg, dg = total(partial, own, many), total(partial + tiles, own, many)
        length = tl.sqrt(gg)
        a = tl.where(length > LEAST, step / tl.maximum(length, LEAST), 0.0)
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
class _Call(NamedTuple):
    """The rows of one call; `plus` is embeds and out, or delta twice where neither is wanted."""

    delta: Tensor
    grad: Tensor
    mask: Tensor
    plus: tuple[Tensor, Tensor]
    step: float
    radius: float
    flags: dict[str, bool]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.delta.shape[1],
            self.delta.stride(0),
            self.grad.stride(0),
            *(x.stride(0) for x in self.plus),
        )


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
    x = rows(delta)
    to = x if out is None else rows(out)
    plus = (x, x) if embeds is None else (rows(embeds), to)
    flags = {"MASKED": mask.numel() > 0, "ADD": embeds is not None}
    call = _Call(x, rows(grad), bytes_of(mask) if flags["MASKED"] else x, plus, step_size, radius, flags)
    with on_device(x):
        if (scope == "token" or norm == "linf") and x.shape[1] <= WHOLE[norm]:
            _by_token(call, norm)
        else:
            tiles = Tiles.over(x.shape[0], *ball(delta, cu_seqlens, scope), cu_seqlens, shape(x.shape[1])[0])
            (l1.by_ball if norm == "l1" else _by_ball)(call, tiles, NORM_CODES[norm])
    write_back(x, delta)
    if out is not None:
        write_back(to, out)


def _by_token(call: _Call, norm: str) -> None:
    T, D = call.delta.shape
    block = max(16, triton.next_power_of_2(D))
    ROWS = rows_at_once(norm, block)
    token_kernel[(triton.cdiv(T, ROWS),)](
        call.delta,
        call.grad,
        call.mask,
        *call.plus,
        T,
        *call.sizes,
        call.step,
        call.radius,
        NORM=NORM_CODES[norm],
        ROWS=ROWS,
        BLOCK=block,
        **options(norm, block),
        **call.flags,
    )


def _by_ball(call: _Call, tiles: Tiles, norm: int) -> None:
    T, D = call.delta.shape
    partial = torch.empty(3 * tiles.programs, dtype=torch.float64, device=call.delta.device)
    usable = torch.empty(T, dtype=torch.uint8, device=call.delta.device)
    ROWS, block = shape(D)
    fixed: dict[str, Any] = {
        "MASKED": call.flags["MASKED"],
        "PACKED": tiles.packed,
        "ROWS": ROWS,
        "BLOCK": block,
        **OPTIONS,
    }
    where = (call.delta, call.grad, call.mask, tiles.cu, partial, usable)
    sums_kernel[(tiles.programs,)](*where, *tiles.numbers, *call.sizes[:3], **fixed)
    step_kernel[(tiles.programs,)](
        *where,
        *call.plus,
        *tiles.numbers,
        *call.sizes,
        call.step,
        call.radius,
        NORM=norm,
        ADD=call.flags["ADD"],
        **fixed | ROOM,
    )


def rows_at_once(norm: str, block: int) -> int:
    """Rows of `block` columns that a program holds."""
    # l1 with two rows of 1024 spills two registers
    return max(1, TILE // (2 if norm == "l1" else 1) // block)


def options(norm: str, block: int) -> dict[str, Any]:
    """Options for rows of `block` columns in registers."""
    return (OPTIONS if norm != "l1" else ROOM) | {"num_warps": 8 if block <= 4096 else 16}


def shape(D: int) -> tuple[int, int]:
    """Rows and columns that a step of a loop takes at once."""
    block = min(BLOCK, max(16, triton.next_power_of_2(D)))
    return TILE // block, block


# --- what it compiles to ----------------------------------------------------------------------------
def _specs() -> Iterator[Spec]:
    ints = dict.fromkeys(
        ("S", "L", "T", "R", "tiles", "D", "delta_stride", "grad_stride", "embeds_stride", "out_stride"),
        "i32",
    )
    types = ints | {
        "delta": "*fp32",
        "mask": "*u8",
        "usable": "*u8",
        "cu": "*i32",
        "partial": "*fp64",
        "step": "fp64",
        "radius": "fp64",
    }
    both = ("load", "store")
    for grad, packed in itertools.product(TRITON_TYPES.values(), (False, True)):
        given = types | {"grad": grad, "embeds": grad, "out": grad}
        flags = {"MASKED": packed, "ADD": packed, "PACKED": packed, "ROWS": TILE // BLOCK, "BLOCK": BLOCK}
        case = f"{grad[1:]} D=4096{' packed mask add' * packed}"
        yield Spec(
            kernel=sums_kernel,
            case=case,
            types=given,
            constants={k: v for k, v in flags.items() if k != "ADD"},
            divisible=True,
            wide=("load",),
            options=OPTIONS,
        )
        yield Spec(
            kernel=step_kernel,
            case=case,
            types=given,
            constants=flags | {"NORM": 0},
            divisible=True,
            wide=both,
            options=ROOM,
        )
        if (grad, packed) in (("*fp32", False), ("*bf16", True)):
            for (norm, code), block in itertools.product(NORM_CODES.items(), (256, 1024, 4096, 8192, 16384)):
                if block > WHOLE[norm]:
                    continue
                yield Spec(
                    kernel=token_kernel,
                    case=f"{norm} {grad[1:]} D={block}{' mask add' * packed}",
                    types=given,
                    constants={
                        "MASKED": packed,
                        "ADD": packed,
                        "NORM": code,
                        "ROWS": rows_at_once(norm, block),
                        "BLOCK": block,
                    },
                    divisible=True,
                    wide=both,
                    options=options(norm, block),
                )


COMPILE = tuple(_specs())
