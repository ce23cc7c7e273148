"""The second stage of a reduction over rows: the partial sums of P programs, added in a fixed order.

The first stage writes partials (P, D), one row a program, and a program takes rows of the input by its number
alone, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import gpu, launch_options, on_device

COLUMNS, ROWS = 32, 64  # 128 bytes of each partial; D / 32 programs
OPTIONS = launch_options(num_warps=4)
INTERPRETED_PROGRAMS = 8  # without a GPU to fill


@triton.jit(do_not_specialize=["P", "D"])
def combine_kernel(out, partials, P, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, P, ROWS):
        p = first + tl.arange(0, ROWS)[:, None]
        acc += tl.load(partials + p.to(tl.int64) * D + d[None, :], (p < P) & (d < D)[None, :], 0.0)
    tl.store(out + d, tl.sum(acc, 0).to(out.dtype.element_ty), d < D)


def programs(x: Tensor, tiles: int, each: int = 2) -> int:
    """How many programs share `tiles` tiles of work: at most a wave of `each` on every multiprocessor."""
    on = gpu(x)
    wave = INTERPRETED_PROGRAMS if on is None else each * on.multiprocessors
    return max(1, min(tiles, wave))


def combine(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis of (P, D) fp32, in `dtype`."""
    P, D = partials.shape
    out = torch.empty(D, dtype=dtype, device=partials.device)
    with on_device(partials):
        combine_kernel[(triton.cdiv(D, COLUMNS),)](out, partials, P, D, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS)
    return out
