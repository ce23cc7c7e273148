"""The numbers of all rows that a decode step starts with, in one launch: `newest` of advance in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device

BLOCK = 128
OPTIONS = launch_options(4)


@triton.jit(do_not_specialize=["B", "N"])
def newest_kernel(  # type: ignore[no-untyped-def]
    position,
    slot,
    short,
    number,
    length,
    table,
    seq,
    key,
    B,
    N,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = b < B
    n = tl.load(length + b, live, 1)
    at = n - 1
    page = tl.load(table + b.to(tl.int64) * N + at // PAGE, live, 0).to(tl.int64)
    tl.store(position + b, at, live)
    tl.store(slot + b, page * PAGE + at % PAGE, live)
    tl.store(short + b, n.to(tl.int32), live)
    tl.store(number + b, tl.load(key + tl.load(seq + b, live, 0), live, 0), live)


# --- launch -----------------------------------------------------------------------------------------
def newest(
    length: Tensor, table: Tensor, seq: Tensor, key: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, slots, lengths as int32, and keys, each (B,)."""
    (B, N), device = table.shape, length.device
    position, slot, number = torch.empty(3, B, dtype=torch.int64, device=device).unbind()
    short = torch.empty(B, dtype=torch.int32, device=device)
    if B:
        with on_device(length):
            newest_kernel[(triton.cdiv(B, BLOCK),)](
                position,
                slot,
                short,
                number,
                length,
                table,
                seq,
                key,
                B,
                N,
                PAGE=page,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return position, slot, short, number
