"""linear in Triton, batch-invariant: one configuration of tiles for every number of rows.

A program owns a tile of the output, and adds up its products over all of K in blocks of one size, in order,
in float32: K is not split, tiles are not chosen by the number of rows, and there are no atomics.  A library
that may choose is faster when there are few rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = {
    "BLOCK_M": 128,
    "BLOCK_N": 128,
    "BLOCK_K": 64,
    "num_warps": 8,
    "num_stages": 3,
    "enable_fp_fusion": True,
}
# for float32, which tensor cores would multiply as TF32
TILE_FP32 = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_K": 16,
    "num_warps": 4,
    "num_stages": 2,
    "enable_fp_fusion": True,
}
GROUP = 8  # tiles of rows that share a tile of the weight while it is in the L2 cache


# --- kernel -----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M"])
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    y_stride,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid, down, across = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    m = (first + pid % (GROUP * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % (GROUP * across) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    rows = x + m.to(tl.int64)[:, None] * x_stride  # T V may exceed 2^31
    columns = weight + n.to(tl.int64)[None, :] * weight_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(rows + (k + lane)[None, :], (m < M)[:, None] & (k + lane < K)[None, :], 0.0)
        b = tl.load(columns + (k + lane)[:, None], (n < N)[None, :] & (k + lane < K)[:, None], 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    to = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


# --- launch -----------------------------------------------------------------------------------------
def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y (T, N) in the dtype of x; an absent bias is empty."""
    return into(torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device), x, weight, bias)


def into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same into `out`, which may be float32 for x of any dtype."""
    x, weight, bias = unit_rows(x), unit_rows(weight), bias.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    tile = tile_of(x.dtype)
    if M and N:
        with on_device(x):
            forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)](
                x,
                weight,
                bias,
                out,
                M,
                N,
                K,
                x.stride(0),
                weight.stride(0),
                out.stride(0),
                BIAS=bias.numel() > 0,
                GROUP=GROUP,
                **tile,
            )
    return out


def tile_of(dtype: torch.dtype) -> dict[str, Any]:
    """The one tile of operands of `dtype`."""
    return TILE_FP32 if dtype == torch.float32 else TILE
