"""rms_norm in Triton: one read of each input and one write of each output, forward and backward.

A program holds whole rows in registers: one of 1024 to 8192 columns, several of narrower ones.  The backward
runs on one wave of programs, each of which walks over its share of the rows and keeps its own sum of dy n for
the weight; the sums are added in a fixed order (_partials.py).  It loads the next rows before it sums the
current ones: 32 KB (48 with an addition) are on their way to a multiprocessor all the time, of the 23 KB that
4.3 TB/s take at a latency of 700 ns (4.3e12 / 132 x 7e-7).  Rows of 8192 fp32 numbers leave no registers for
that; they are 64 (96) KB each.  Rows of more than 8192 columns are read twice, the second time from the
cache, and the gradient of their weight takes another launch.  The width and the number of rows are runtime
values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows
from fastrl.kernels._triton._partials import combine, programs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # columns a program holds: dy, x, the weight and its gradient take 64 of a thread's registers
FORWARD, BACKWARD = 1024, 4096  # least elements of a tile, for 16 and for 2 programs a multiprocessor
# bytes of a tile of one input, up to which two programs of the backward fit on a multiprocessor, and up to
# which a program holds the next tile, too
SMALL, HELD = 8 << 10, 16 << 10
MOST_REGISTERS = 248  # of one program of 8 warps; without it ptxas may aim at 128, and spill two
WALK = 4096  # columns at a time of a row that is not held
WALKING = {"BLOCK": WALK, "num_warps": 8, "enable_fp_fusion": True}
WEIGHT = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "enable_fp_fusion": True}  # the weight's gradient alone


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _inverse(total, D, eps):  # type: ignore[no-untyped-def]
    return tl.div_rn(1.0, tl.sqrt_rn(total / D + eps))


@triton.jit
def _scaled(v, r, w, y):  # type: ignore[no-untyped-def]
    """Rounded before the weight, and after."""
    return ((v * r).to(y.dtype.element_ty).to(tl.float32) * w).to(y.dtype.element_ty)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    y,
    h,
    r,
    T,
    D,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # T D may exceed 2^31
    lane = tl.arange(0, BLOCK)[None, :]
    ok = (t < T) & (lane < D)
    v = tl.load(x + t * x_stride + lane, ok, 0.0).to(tl.float32)
    if ADD:
        total = (v + tl.load(residual + t * residual_stride + lane, ok, 0.0).to(tl.float32)).to(
            h.dtype.element_ty
        )
        tl.store(h + t * D + lane, total, ok)
        v = total.to(tl.float32)
    inverse = _inverse(tl.sum(v * v, 1)[:, None], D, eps)
    tl.store(r + t, inverse, t < T)
    w = tl.load(weight + lane, lane < D, 0.0).to(tl.float32)
    tl.store(y + t * D + lane, _scaled(v, inverse, w, y), ok)


@triton.jit
def walk_forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, y, h, r, D, x_stride, residual_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for d in range(0, D, BLOCK):
        at = d + lane
        v = tl.load(x + t * x_stride + at, at < D, 0.0).to(tl.float32)
        if ADD:
            total = (v + tl.load(residual + t * residual_stride + at, at < D, 0.0).to(tl.float32)).to(
                h.dtype.element_ty
            )
            tl.store(h + t * D + at, total, at < D)
            v = total.to(tl.float32)
        squares += v * v
    inverse = _inverse(tl.sum(squares, 0), D, eps)
    tl.store(r + t, inverse)
    tl.debug_barrier()  # h is read again below
    for d in range(0, D, BLOCK):
        at = d + lane
        again = h + t * D + at if ADD else x + t * x_stride + at
        w = tl.load(weight + at, at < D, 0.0).to(tl.float32)
        tl.store(y + t * D + at, _scaled(tl.load(again, at < D, 0.0).to(tl.float32), inverse, w, y), at < D)


@triton.jit
def _rows(first, T, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """ROWS rows from `first` on, and which of their elements there are."""
    t = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return t, (t < T) & (tl.arange(0, BLOCK)[None, :] < D)


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    dy, dh, x, r, t, ok, T, dy_stride, dh_stride, x_stride, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows t of dy, x and dh (of dy without ADD), as they are stored, and of r."""
    lane = tl.arange(0, BLOCK)[None, :]
    up = tl.load(dy + t * dy_stride + lane, ok, 0.0)
    v = tl.load(x + t * x_stride + lane, ok, 0.0)
    other = up
    if ADD:
        other = tl.load(dh + t * dh_stride + lane, ok, 0.0)
    return up, v, other, tl.load(r + t, t < T, 0.0)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(  # type: ignore[no-untyped-def]
    dx,
    partials,
    dy,
    dh,
    x,
    weight,
    r,
    T,
    D,
    dy_stride,
    dh_stride,
    x_stride,
    ADD: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    lane = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + lane, lane < D, 0.0).to(tl.float32)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    t, ok = _rows(p * ROWS, T, D, ROWS, BLOCK)
    up, v, other, inverse = _inputs(dy, dh, x, r, t, ok, T, dy_stride, dh_stride, x_stride, ADD, BLOCK)
    for first in range(p * ROWS, T, tl.num_programs(0) * ROWS):
        s, near = _rows(first + tl.num_programs(0) * ROWS, T, D, ROWS, BLOCK)
        if AHEAD:  # the next rows are on their way while these are summed
            coming = _inputs(dy, dh, x, r, s, near, T, dy_stride, dh_stride, x_stride, ADD, BLOCK)
        upward = up.to(tl.float32)
        n, g = v.to(tl.float32) * inverse, upward * w
        acc += upward * n
        out = (g - n * (tl.sum(g * n, 1)[:, None] / D)) * inverse
        if ADD:
            out += other.to(tl.float32)
        tl.store(dx + t * D + lane, out.to(dx.dtype.element_ty), ok)
        if not AHEAD:
            coming = _inputs(dy, dh, x, r, s, near, T, dy_stride, dh_stride, x_stride, ADD, BLOCK)
        t, ok = s, near
        up, v, other, inverse = coming
    d = tl.arange(0, BLOCK)
    tl.store(partials + p.to(tl.int64) * D + d, tl.sum(acc, 0), d < D)


@triton.jit
def walk_backward_kernel(  # type: ignore[no-untyped-def]
    dx, dy, dh, x, weight, r, D, dy_stride, dh_stride, x_stride, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inverse = tl.load(r + t)
    products = tl.zeros((BLOCK,), tl.float32)
    for d in range(0, D, BLOCK):
        at = d + lane
        g = tl.load(dy + t * dy_stride + at, at < D, 0.0).to(tl.float32) * tl.load(
            weight + at, at < D, 0.0
        ).to(tl.float32)
        products += g * (tl.load(x + t * x_stride + at, at < D, 0.0).to(tl.float32) * inverse)
    mean = tl.sum(products, 0) / D
    for d in range(0, D, BLOCK):
        at = d + lane
        g = tl.load(dy + t * dy_stride + at, at < D, 0.0).to(tl.float32) * tl.load(
            weight + at, at < D, 0.0
        ).to(tl.float32)
        out = (g - tl.load(x + t * x_stride + at, at < D, 0.0).to(tl.float32) * inverse * mean) * inverse
        if ADD:
            out += tl.load(dh + t * dh_stride + at, at < D, 0.0).to(tl.float32)
        tl.store(dx + t * D + at, out.to(dx.dtype.element_ty), at < D)


@triton.jit(do_not_specialize=["T"])
def walk_weight_kernel(  # type: ignore[no-untyped-def]
    partials, dy, x, r, T, D, dy_stride, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(D, COLUMNS)
    p, d = tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(p * ROWS, T, tl.num_programs(0) // blocks * ROWS):
        t = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        ok = (t < T) & (d < D)[None, :]
        v = tl.load(x + t * x_stride + d[None, :], ok, 0.0).to(tl.float32) * tl.load(r + t, t < T, 0.0)
        acc += tl.load(dy + t * dy_stride + d[None, :], ok, 0.0).to(tl.float32) * v
    tl.store(partials + p.to(tl.int64) * D + d, tl.sum(acc, 0), d < D)


# --- launch -----------------------------------------------------------------------------------------
def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (T, D) and r (T, 1)."""
    y, _, r = _forward(unit_rows(x), None, weight, eps)
    return y, r


def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual, and r."""
    return _forward(unit_rows(x), unit_rows(residual), weight, eps)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    T, D = x.shape
    y, h = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else x
        for wanted in (True, residual is not None)
    )
    r = torch.empty(T, 1, dtype=torch.float32, device=x.device)
    other = x if residual is None else residual
    tensors, strides = (x, other, weight.contiguous(), y, h, r), (x.stride(0), other.stride(0), eps)
    if T and D:
        with on_device(x):
            if D > WIDEST:
                walk_forward_kernel[(T,)](*tensors, D, *strides, ADD=residual is not None, **WALKING)
            else:
                tile = _tile(D, FORWARD)
                forward_kernel[(triton.cdiv(T, tile["ROWS"]),)](
                    *tensors, T, D, *strides, ADD=residual is not None, **tile
                )
    return y, h, r


def backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dx (T, D) and dw (D,)."""
    return _backward(unit_rows(dy), None, unit_rows(x), weight.contiguous(), r)


def add_backward(dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of both summands, that which arrives at their sum included, and dw."""
    return _backward(unit_rows(dy), unit_rows(dh), unit_rows(h), weight.contiguous(), r)


def _backward(dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    T, D = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if T == 0 or D == 0:
        return dx, torch.zeros_like(weight)
    other, wide = dy if dh is None else dh, D > WIDEST
    tile = _tile(D, BACKWARD)
    size = tile["ROWS"] * tile["BLOCK"] * x.element_size()
    each = 2 if wide or size <= SMALL else 1
    P = programs(x, triton.cdiv(T, WEIGHT["ROWS"] if wide else tile["ROWS"]), each)
    limit = {"maxnreg": MOST_REGISTERS} if each == 1 and tile["num_warps"] == 8 else {}
    partials = torch.empty(P, D, dtype=torch.float32, device=x.device)
    strides = dy.stride(0), other.stride(0), x.stride(0)
    with on_device(x):
        if wide:
            walk_backward_kernel[(T,)](
                dx, dy, other, x, weight, r, D, *strides, ADD=dh is not None, **WALKING
            )
            walk_weight_kernel[(P * triton.cdiv(D, WEIGHT["COLUMNS"]),)](
                partials, dy, x, r, T, D, dy.stride(0), x.stride(0), **WEIGHT
            )
        else:
            backward_kernel[(P,)](
                dx,
                partials,
                dy,
                other,
                x,
                weight,
                r,
                T,
                D,
                *strides,
                ADD=dh is not None,
                AHEAD=size <= HELD,
                **tile,
                **limit,
            )
    return dx, combine(partials, weight.dtype)


def _tile(D: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program, powers of two, and its warps: 8 or 16 elements a thread."""
    block = max(16, triton.next_power_of_2(D))
    rows = max(1, elements // block)
    return {
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(16, max(4, rows * block // 512)),
        "enable_fp_fusion": True,
    }
