"""The two products of a decode step that are added to the residual stream, and the stream's sums of squares.

    h = residual + x W^T      squares[m, part] = sum of h^2 over the columns of one program

A weight with few rows has few tiles, so its products may be cut along K: each program leaves its sums in
memory, and the last of a tile to arrive adds them up, in their order, not in that of arrival.  Two runs give
the same bits.  `enter` makes a stream with its squares of what comes from elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrl.kernels._triton._chain import after_others, last_to_arrive
from fastrl.kernels._triton._rows import fence, in_registers, rounded


@triton.jit(do_not_specialize=["M", "parts"])
def residual_kernel(  # type: ignore[no-untyped-def]
    h,
    squares,
    partials,
    tickets,
    x,
    weight,
    residual,
    M,
    parts,
    N,
    K,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):
    after_others(CHAIN)
    tile, split, down = tl.program_id(0), tl.program_id(1), tl.cdiv(M, BLOCK_M)
    m = tile % down * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // down * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = x + m.to(tl.int64)[:, None] * K
    columns = weight + n.to(tl.int64)[None, :] * K
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(split * share, tl.minimum(K, split * share + share), BLOCK_K):
        at = k + lane
        a = tl.load(rows + at[None, :], (m < M)[:, None] & (at < K)[None, :], 0.0)
        b = tl.load(columns + at[:, None], (n < N)[None, :] & (at < K)[:, None], 0.0)
        if CHAIN:
            a = in_registers(a)
            fence()
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if SPLITS > 1:
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        here = partials + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + within
        tl.store(here + split * (BLOCK_M * BLOCK_N), acc)
        if not last_to_arrive(tickets, tile, SPLITS):
            return
        acc = tl.load(here, cache_modifier=".cg")
        for i in range(1, SPLITS):
            acc += tl.load(here + i * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    row, ok = m.to(tl.int64)[:, None], (m < M)[:, None] & (n < N)[None, :]
    total = rounded(acc, h) + tl.load(residual + row * N + n[None, :], ok, 0.0).to(tl.float32)
    total = total.to(h.dtype.element_ty)
    tl.store(h + row * N + n[None, :], total, ok)
    v = tl.where(ok, total.to(tl.float32), 0.0)
    tl.store(squares + m.to(tl.int64) * parts + tile // down, tl.sum(v * v, 1), m < M)


@triton.jit(do_not_specialize=["M", "parts", "n_tickets"])
def enter_kernel(  # type: ignore[no-untyped-def]
    h,
    squares,
    tickets,
    x,
    residual,
    M,
    parts,
    n_tickets,
    D,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    TICKETS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """A part of a row: x, or x + residual, which is stored, and the sum of its squares; and all tickets 0."""
    after_others(CHAIN)
    m, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    d = part * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + m * D + d, d < D, 0.0).to(tl.float32)
    if ADD:
        total = (v + tl.load(residual + m * D + d, d < D, 0.0).to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + m * D + d, total, d < D)
        v = total.to(tl.float32)
    tl.store(squares + m * parts + part, tl.sum(v * v, 0))
    for first in range(tl.program_id(0) * TICKETS, n_tickets, tl.num_programs(0) * TICKETS):
        ticket = first + tl.arange(0, TICKETS)
        tl.store(tickets + ticket, tl.zeros((TICKETS,), tl.int32), ticket < n_tickets)
