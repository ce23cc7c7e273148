"""advance in Triton: one program with a lane for each row, in blocks that take pages from the stack in turn.

A step of B rows moves about 100 B bytes: its cost is the launch, so there is one only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device
from fastrl.kernels._triton.newest import newest as newest

DTYPES = (torch.float32,)  # of the log-probs
LARGEST_BLOCK = 1024


@triton.jit(do_not_specialize=["B", "C", "N", "n_stops"])
def forward_kernel(  # type: ignore[no-untyped-def]
    token,
    logp,
    behaviour,
    entropy,
    seq,
    length,
    drawn,
    budget,
    until,
    last,
    alive,
    table,
    tokens,
    logps,
    behaviours,
    entropies,
    chosen,
    versions,
    lengths,
    finish,
    free,
    top,
    refs,
    stops,
    version,
    total,
    B,
    C,
    N,
    n_stops,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    left = tl.load(top)
    count = tl.load(total)
    by = tl.load(version)
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        inside = b < B
        on = inside & (tl.load(alive + b, inside, 0) != 0)
        s = tl.load(seq + b, on, 0)
        c = tl.load(length + b, on, 0)
        new = tl.load(token + b, on, 0)
        place = s * C + c
        tl.store(tokens + place, new, on)
        tl.store(logps + place, tl.load(logp + b, on, 0.0), on)
        tl.store(behaviours + place, tl.load(behaviour + b, on, 0.0), on)
        tl.store(entropies + place, tl.load(entropy + b, on, 0.0), on)
        tl.store(chosen + place, on, on)
        tl.store(versions + place, by.to(tl.int32), on)
        n = tl.load(drawn + b, on, 0) + 1
        tl.store(length + b, c + 1, on)
        tl.store(drawn + b, n, on)
        tl.store(last + b, new, on)
        stopped = on & (new < 0)  # never: a token is not negative
        for i in range(n_stops):
            stopped = stopped | (on & (new == tl.load(stops + i)))
        full = (n >= tl.load(budget + b, on, 0)) | (c + 1 >= tl.load(until + b, on, 0))
        ended = on & (stopped | full)
        goes = on & (stopped == 0) & (full == 0)
        tl.store(lengths + s, c + 1, on)
        tl.store(finish + s, tl.where(ended, tl.where(stopped, 1, 2), 0).to(tl.int8), on)
        tl.store(alive + b, goes, on)
        needy = goes & (c % PAGE == 0)
        rank = tl.cumsum(needy.to(tl.int64), 0)
        given = tl.load(free + (left - rank), needy, 0)
        tl.store(table + b.to(tl.int64) * N + c // PAGE, given, needy)
        tl.store(refs + given, tl.full((BLOCK,), 1, tl.int32), needy)
        left -= tl.sum(needy.to(tl.int64), 0)
        count += tl.sum(on.to(tl.int64), 0)
    tl.store(top, left)
    tl.store(total, count)


# --- launch -----------------------------------------------------------------------------------------
def options(block: int) -> dict[str, Any]:
    """One lane for each row, at most: lanes beyond the rows would repeat the work of others, and read rows
    that these have advanced already.
    """
    return {"num_warps": max(1, min(4, block // 32)), "enable_fp_fusion": True}


def forward(
    draw: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    records: tuple[Tensor, ...],
    pages: tuple[Tensor, ...],
    stops: Tensor,
    version: Tensor,
    total: Tensor,
    page: int,
) -> None:
    """Advance every row, in place."""
    table, tokens = rows[-1], records[0]
    block = min(LARGEST_BLOCK, triton.next_power_of_2(table.shape[0]))
    with on_device(table):
        forward_kernel[(1,)](
            *draw,
            *rows,
            *records,
            *pages,
            stops,
            version,
            total,
            table.shape[0],
            tokens.shape[1],
            table.shape[1],
            stops.shape[0],
            PAGE=page,
            BLOCK=block,
            **options(block),
        )
