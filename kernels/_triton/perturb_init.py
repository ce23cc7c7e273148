"""perturb_init in Triton: one launch that only writes.

Every random word is that of the reference, and so is every rounding: fp64 from the word on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device
from fastrl.kernels._perturb import NORM_CODES, ball, bytes_of
from fastrl.kernels._philox import split
from fastrl.kernels._triton._philox import philox4
from fastrl.kernels._triton._tiles import Tiles, find_tile, wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
L2, LINF = tl.constexpr(0), tl.constexpr(1)
OWNER = tl.constexpr(0x70657274)
COUNTERS = 1024  # that a program draws from at once: four numbers each
OPTIONS = launch_options(num_warps=8)


@triton.jit
def live_tokens(mask, a, b, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, PART)
    n = tl.zeros((PART,), tl.int32)
    for i in range(a, b, PART):
        n += (tl.load(mask + i + lane, i + lane < b, 0) != 0).to(tl.int32)
    return tl.sum(n, 0).to(tl.int64)


@triton.jit(do_not_specialize=["S", "L", "T", "R", "seed_low", "seed_high"])
def start_kernel(  # type: ignore[no-untyped-def]
    delta,
    mask,
    cu,
    S,
    L,
    T,
    R,
    D,
    seed_low: tl.int64,
    seed_high: tl.int64,
    radius: tl.float64,
    NORM: tl.constexpr,
    TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    u, _, _, begin, end = find_tile(tl.program_id(0), cu, S, L, T, R, PACKED)
    if PACKED:
        a, b = tl.load(cu + u).to(tl.int64), tl.load(cu + u + 1).to(tl.int64)
    else:
        a = u.to(tl.int64) * L
        b = a + L
    n = b - a
    if TOKEN:
        n = tl.full((), 1, tl.int64)
    elif MASKED:
        n = tl.maximum(live_tokens(mask, a, tl.minimum(b, T), 1024), 1)
    edge = wide(radius)
    if NORM == L2:
        edge = edge / tl.sqrt((n * D).to(tl.float64))
    elif NORM != LINF:
        edge = edge / (n * D).to(tl.float64)
    low, high = begin * D, end * D  # elements of this tile; its first counter may begin in the tile before
    for c in range(low // 4, (high + 3) // 4, COUNTERS):
        counter = tl.arange(0, COUNTERS).to(tl.int64) + c
        w0, w1, w2, w3 = philox4(counter & 0xFFFFFFFF, counter >> 32, 0, OWNER, seed_low, seed_high)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        twice = word.to(tl.int64) * 2 + (1 - 4294967296)  # (2 u - 1) 2^32, exactly
        x = (twice.to(tl.float64) * (edge * 2.0**-32)).to(tl.float32)
        i = tl.arange(0, 4 * COUNTERS).to(tl.int64) + c * 4
        here = (i >= low) & (i < high)
        if MASKED:
            x = tl.where(tl.load(mask + i // D, here, 0) != 0, x, 0.0)
        tl.store(delta + i, x, here)


def forward(
    embeds: Tensor, cu_seqlens: Tensor, mask: Tensor, radius: float, norm: str, scope: str, seed: int
) -> Tensor:
    """A start shaped like `embeds`."""
    delta = torch.empty(embeds.shape, dtype=torch.float32, device=embeds.device)
    T, D = embeds.shape[:-1].numel(), embeds.shape[-1]
    if not delta.numel():
        return delta
    # a token's own ball holds D elements, whichever it is
    S, L = (1, T) if scope == "token" else ball(embeds, cu_seqlens, scope)
    tiles = Tiles.over(T, S, L, cu_seqlens, max(1, 4 * COUNTERS // D))
    masked = mask.numel() > 0
    with on_device(delta):
        start_kernel[(tiles.programs,)](
            delta,
            bytes_of(mask) if masked else delta,
            tiles.cu,
            *tiles.numbers[:4],
            D,
            *split(seed),
            radius,
            NORM=NORM_CODES[norm],
            TOKEN=scope == "token",
            MASKED=masked,
            PACKED=tiles.packed,
            COUNTERS=COUNTERS,
            **OPTIONS,
        )
    return delta
