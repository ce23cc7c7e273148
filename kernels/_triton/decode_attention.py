"""decode_attention in Triton: split keys, shared heads packed, a second launch only where a table allows more
than one split.

A program takes one key head of one query and SPLIT of its tokens; the query heads that share the key head are
the rows of its matrix products, so that keys and values are read once.  The grid covers the whole table: the
lengths are read from device memory, and a program past the length of its query returns, so that a captured
graph is correct for any lengths.  A query of at most SPLIT tokens is finished by its first program; the
splits of a longer one are added in order.  Splits and blocks start at fixed positions, so that the bits of a
query do not depend on the batch.

Queries are the fast axis of the grid: those of one group are neighbours in a batch, and find their shared
pages in the L2 cache.

Beside keys, values and queries a call moves 4 (E + 2) bytes for each query head and split in use, written and
read once: with SPLIT 256, bf16 and seven heads of 64 to a key head, 6% of the keys and values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows
from fastrl.kernels._triton._chain import after_others, chain, last_to_arrive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens of a program: 64 KB of bf16 keys and values of width 64, a wave of two for 256 queries of 1024 tokens
SPLIT = 256
BLOCK = 64  # keys at a time
ROWS = 16  # of a matrix product, at least
CHUNK = 16  # splits that are added at a time
COMBINE = {"num_warps": 2, "enable_fp_fusion": True}


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _slots(table, pages, first, start, last, PAGE: tl.constexpr, PAGES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The slots of a block's tokens; past `last` the table may hold anything, and is not read.

    Whole pages are looked up in `pages`, those of the split: a load with a loaded address is not pipelined.
    """
    position = start + tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        this_page = first // PAGE + tl.arange(0, PAGES) == start // PAGE
        return tl.sum(tl.where(this_page, pages, 0), 0).to(tl.int64) * PAGE + position % PAGE
    return tl.load(table + position // PAGE, position < last, 0).to(tl.int64) * PAGE + position % PAGE


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    y,
    partials,
    tops,
    totals,
    tickets,
    head,
    splits,
    n,
    live,
    lane,
    E,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up the n splits of a query, in order, if this is the last of its programs to arrive."""
    if last_to_arrive(tickets, tl.program_id(0), n):
        at, some = head * splits, live[:, None] & (lane < E)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        for i in range(0, n):
            top = tl.maximum(top, tl.load(tops + at + i, live, 0.0, cache_modifier=".cg"))
        total, acc = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
        for i in range(0, n):
            weight = tl.exp2(tl.load(tops + at + i, live, 0.0, cache_modifier=".cg") - top)
            total += weight * tl.load(totals + at + i, live, 1.0, cache_modifier=".cg")
            part = tl.load(partials + (at + i)[:, None] * E + lane, some, 0.0, cache_modifier=".cg")
            acc += weight[:, None] * part
        out = acc / total[:, None]
        tl.store(y + head[:, None] * E + lane, out.to(y.dtype.element_ty), some)


@triton.jit(do_not_specialize=["q_token", "table_row", "splits"])
def split_kernel(  # type: ignore[no-untyped-def]
    y,
    partials,
    tops,
    totals,
    tickets,
    q,
    k_cache,
    v_cache,
    table,
    lengths,
    rows,
    q_token,
    q_head,
    table_row,
    splits,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    BY_ROW: tl.constexpr,
    ONE: tl.constexpr,
    TICKETS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHAIN: tl.constexpr,
):
    after_others(CHAIN)
    b, h, split = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K, tl.program_id(1)
    length, first = tl.load(lengths + b).to(tl.int32), split * SPLIT
    if (first >= length) & (split > 0):
        return
    last = tl.minimum(length, first + SPLIT)
    table += (tl.load(rows + b).to(tl.int64) if BY_ROW else b) * table_row
    g, lane = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    live = (g < G)[:, None] & (lane < E)
    query = tl.load(q + b * q_token + (h * G + g)[:, None] * q_head + lane, live, 0.0)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    page = first // PAGE + tl.arange(0, PAGES)
    pages = tl.load(table + page, page * PAGE < last, 0)
    for start in range(first, last, BLOCK):
        here = start + tl.arange(0, BLOCK) < last
        at = ((_slots(table, pages, first, start, last, PAGE, PAGES, BLOCK) * K + h) * E)[:, None] + lane
        k = tl.load(k_cache + at, here[:, None] & (lane < E), 0.0)
        v = tl.load(v_cache + at, here[:, None] & (lane < E), 0.0)
        s = tl.where(here[None, :], tl.dot(query, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        now = tl.maximum(top, tl.max(s, 1))
        p, faded = tl.exp2(s - now[:, None]), tl.exp2(top - now)
        total = total * faded + tl.sum(p, 1)
        acc = acc * faded[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = now
    head = b * (K * G) + h * G + g
    whole = g < tl.where(length <= SPLIT, G, 0)
    out = acc / tl.where(length > 0, total, 1.0)[:, None]
    tl.store(y + head[:, None] * E + lane, out.to(y.dtype.element_ty), whole[:, None] & (lane < E))
    if not ONE:
        part = g < tl.where(length > SPLIT, G, 0)
        to = head * splits + split
        tl.store(partials + to[:, None] * E + lane, acc, part[:, None] & (lane < E))
        tl.store(tops + to, top, part)
        tl.store(totals + to, total, part)
        if TICKETS:
            n = tl.cdiv(length, SPLIT)
            if n > 1:
                _finish(y, partials, tops, totals, tickets, head, splits, n, g < G, lane, E, ROWS, WIDTH)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(  # type: ignore[no-untyped-def]
    y,
    partials,
    tops,
    totals,
    lengths,
    splits,
    H: tl.constexpr,
    E: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    n = tl.cdiv(tl.load(lengths + head // H).to(tl.int32), SPLIT)
    if n <= 1:
        return
    i, lane = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    most = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, n, CHUNK):
        most = tl.maximum(most, tl.load(tops + head * splits + first + i, first + i < n, float("-inf")))
    top = tl.max(most, 0)
    total, acc = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK, WIDTH), tl.float32)
    for first in range(0, n, CHUNK):
        at, some = head * splits + first + i, first + i < n
        weight = tl.exp2(tl.load(tops + at, some, float("-inf")) - top)
        total += weight * tl.load(totals + at, some, 0.0)
        acc += weight[:, None] * tl.load(
            partials + at[:, None] * E + lane[None, :], some[:, None] & (lane < E)[None, :], 0.0
        )
    out = tl.sum(acc, 0) / tl.sum(total, 0)
    tl.store(y + head * E + lane, out.to(y.dtype.element_ty), lane < E)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
    tickets: Tensor | None = None,
) -> Tensor:
    """y (B, H, E); one launch where the table holds at most SPLIT tokens, else two.

    With `tickets`, B K zeros int32, which are left as they were, there is always one: the last program of a
    query to finish adds up its splits.
    """
    q, table = unit_rows(q), unit_rows(block_table)
    (B, H, E), (_, page, K, _), N = q.shape, k_cache.shape, table.shape[1]
    y = torch.empty(B, H, E, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    lengths = lengths.contiguous()
    rows = None if rows is None else rows.contiguous()

    splits = max(1, triton.cdiv(N * page, SPLIT))
    partial = B * H * splits if splits > 1 else 0
    partials, tops, totals = (
        torch.empty(partial * n, dtype=torch.float32, device=q.device) for n in (E, 1, 1)
    )
    with on_device(q):
        split_kernel[(B * K, splits)](
            y,
            partials,
            tops,
            totals,
            lengths if tickets is None else tickets,
            q,
            k_cache,
            v_cache,
            table,
            lengths,
            lengths if rows is None else rows,
            q.stride(0),
            q.stride(1),
            table.stride(0),
            splits,
            scale * math.log2(math.e),
            BY_ROW=rows is not None,
            ONE=splits == 1,
            TICKETS=tickets is not None,
            **_shape(H, K, E, page, q.dtype),
            **_options(q.dtype, E),
            **(chain(q) if tickets is not None else {"CHAIN": False}),
        )
        if splits > 1 and tickets is None:
            combine_kernel[(B * H,)](
                y,
                partials,
                tops,
                totals,
                lengths,
                splits,
                H=H,
                E=E,
                SPLIT=SPLIT,
                CHUNK=CHUNK,
                WIDTH=_width(E),
                **COMBINE,
            )
    return y


def _width(E: int) -> int:
    return max(16, triton.next_power_of_2(E))


def _shape(H: int, K: int, E: int, page: int, dtype: torch.dtype) -> dict[str, int]:
    rows = max(ROWS, triton.next_power_of_2(H // K))
    aligned = SPLIT % page == 0 or page % SPLIT == 0
    # pages that a split reaches into
    pages = max(1, SPLIT // page) if aligned else triton.next_power_of_2(SPLIT // page + 2)
    # the products of wide fp32 heads need registers
    block = BLOCK // 2 if dtype == torch.float32 and E > 64 else BLOCK
    return {
        "K": K,
        "G": H // K,
        "E": E,
        "PAGE": page,
        "PAGES": pages,
        "SPLIT": SPLIT,
        "BLOCK": block,
        "ROWS": rows,
        "WIDTH": _width(E),
    }


def _options(dtype: torch.dtype, E: int) -> dict[str, int | bool]:
    """Two blocks of bf16 keys and values in flight, 36 to 72 KB, one of fp32; eight warps for wide fp32
    heads.
    """
    wide = dtype == torch.float32
    return {
        "num_warps": 8 if wide and E > 64 else 4,
        "num_stages": 2 if wide else 3,
        "enable_fp_fusion": True,
    }
