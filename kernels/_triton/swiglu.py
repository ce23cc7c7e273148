"""swiglu in Triton: a program takes a block of columns of one row, gate and up together.

There is one read of each input and one write of each output.  The width and the number of rows are runtime
values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device, unit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024  # 8 elements a thread: 16 bytes of bf16 from each half
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def forward_kernel(x, y, F, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(F, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)  # 2 T F exceeds 2^31 at F = 14336, T = 75k
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + t * stride + at, at < F, 0.0).to(tl.float32)
    up = tl.load(x + t * stride + F + at, at < F, 0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp2(-gate * LOG2E)) * up
    tl.store(y + t * F + at, out.to(y.dtype.element_ty), at < F)


@triton.jit
def backward_kernel(dx, dy, x, F, dy_stride, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(F, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + t * stride + at, at < F, 0.0).to(tl.float32)
    up = tl.load(x + t * stride + F + at, at < F, 0.0).to(tl.float32)
    d = tl.load(dy + t * dy_stride + at, at < F, 0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
    slope = s * tl.fma(gate, 1.0 - s, tl.full((BLOCK,), 1.0, tl.float32))
    to = dx + t * 2 * F + at
    tl.store(to, (d * up * slope).to(dx.dtype.element_ty), at < F)
    tl.store(to + F, (d * (gate * s)).to(dx.dtype.element_ty), at < F)


# --- launch -----------------------------------------------------------------------------------------
def forward(gate_up: Tensor) -> Tensor:
    """silu(gate) up, (T, F)."""
    x = unit_rows(gate_up)
    T, F = x.shape[0], x.shape[1] // 2
    y = torch.empty(T, F, dtype=x.dtype, device=x.device)
    if y.numel():
        with on_device(x):
            forward_kernel[(T * triton.cdiv(F, BLOCK),)](x, y, F, x.stride(0), BLOCK=BLOCK, **OPTIONS)
    return y


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up, (T, 2F)."""
    x, dy = unit_rows(gate_up), unit_rows(dy)
    T, F = dy.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        with on_device(x):
            backward_kernel[(T * triton.cdiv(F, BLOCK),)](
                dx, dy, x, F, dy.stride(0), x.stride(0), BLOCK=BLOCK, **OPTIONS
            )
    return dx
