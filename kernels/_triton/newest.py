"""newest in Triton: one launch for the numbers of all rows that a decode step starts with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import Spec, launch_options, on_device

DTYPES = (torch.int64,)  # of the lengths
BLOCK = 128
OPTIONS = launch_options(4)


@triton.jit(do_not_specialize=["B", "N"])
def forward_kernel(  # type: ignore[no-untyped-def]
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
def forward(
    length: Tensor, table: Tensor, seq: Tensor, key: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, slots, lengths as int32, and keys, each (B,)."""
    (B, N), device = table.shape, length.device
    position, slot, number = torch.empty(3, B, dtype=torch.int64, device=device).unbind()
    short = torch.empty(B, dtype=torch.int32, device=device)
    if B:
        with on_device(length):
            forward_kernel[(triton.cdiv(B, BLOCK),)](
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


# --- what it compiles to ----------------------------------------------------------------------------
def _specs() -> Iterator[Spec]:
    longs = ("position", "slot", "number", "length", "seq", "key")
    types = dict.fromkeys(longs, "*i64") | {"table": "*i32", "short": "*i32", "B": "i32", "N": "i32"}
    yield Spec(
        kernel=forward_kernel,
        case="pages of 64",
        types=types,
        constants={"PAGE": 64, "BLOCK": BLOCK},
        divisible=False,
        options=OPTIONS,
    )


COMPILE = tuple(_specs())
