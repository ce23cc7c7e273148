"""What the fused products of a decode step share: rows of the residual stream, normed as they are read.

The stream h (M, D) comes with `squares` (M, parts), the sums of h^2 over parts of each row, which the kernel
that wrote h left there.  A program adds up those of its rows, in order, and norms each block of h on its way
into a product: rounded where rms_norm rounds, so that the product sees the bits that it would read from
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_of(squares, m, M, parts, D, eps, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / sqrt(mean h^2 + eps) of rows m, a column."""
    part = tl.arange(0, PARTS)[None, :]
    row = m.to(tl.int64)[:, None]
    some = tl.load(squares + row * parts + part, (row < M) & (part < parts), 0.0)
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(some, 1)[:, None] / D + eps))


@triton.jit
def fence():  # type: ignore[no-untyped-def]
    """Let the tensor cores of sm_90 see copies to shared memory; Triton 3.6 leaves it out where the other
    operand is in registers.
    """
    tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def in_registers(x):  # type: ignore[no-untyped-def]
    """x, which a product then takes from registers: what follows comes after the wait for its copy."""
    if x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def two_products(  # type: ignore[no-untyped-def]
    h,
    inverse,
    norm,
    weight,
    m,
    M,
    D,
    first,
    second,
    live,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Normed rows m of h times rows `first` and rows `second` of the weight (N, D), fp32 (BLOCK_M, LANES)
    each.
    """
    lane = tl.arange(0, BLOCK_K)
    rows = h + m.to(tl.int64)[:, None] * D
    firsts = weight + first.to(tl.int64)[None, :] * D
    seconds = weight + second.to(tl.int64)[None, :] * D
    a = tl.zeros((BLOCK_M, LANES), tl.float32)
    b = tl.zeros((BLOCK_M, LANES), tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + lane
        inside = at < D
        x = tl.load(rows + at[None, :], (m < M)[:, None] & inside[None, :], 0.0)
        w = tl.load(norm + at, inside, 0.0).to(tl.float32)[None, :]
        x = ((x.to(tl.float32) * inverse).to(x.dtype).to(tl.float32) * w).to(x.dtype)
        if FENCE:
            fence()
        columns = live[None, :] & inside[:, None]
        a = tl.dot(x, tl.load(firsts + at[:, None], columns, 0.0), a, input_precision="ieee")
        b = tl.dot(x, tl.load(seconds + at[:, None], columns, 0.0), b, input_precision="ieee")
    return a, b


@triton.jit
def rounded(x, like):  # type: ignore[no-untyped-def]
    """fp32 x with the bits it would have in memory, behind the pointer `like`."""
    return x.to(like.dtype.element_ty).to(tl.float32)
