"""A row of logits in registers: a block of it is 16 tensors of LANES floats, 16 elements a thread.

A lane holds neighbours, 16 bytes of them, in each of the pieces of a block:

    piece p of 16-bit logits, LANES * 8 elements:   lane 0: 0..7   lane 1: 8..15   ...   lane 255: 2040..2047

Sums and maxima over the 16 tensors stay inside a thread, and need no shuffle.  What a lane holds depends on
the column alone, not on where the row lies: a row that begins at a multiple of 16 bytes is loaded 16 bytes at
a time, any other one element by element, and both give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastrl.kernels._launch import launch_options

LANES = tl.constexpr(256)  # one a thread
BLOCK = tl.constexpr(4096)  # elements of a block: 16 a lane
OPTIONS = launch_options(num_warps=8)


@triton.jit
def rounded(a, b):  # type: ignore[no-untyped-def]
    """a b, rounded before a sum over lanes adds it to another's.

    The compiler would fuse the product with that addition: of two lanes that add each other's products, each
    would round only the other's, and the lanes of a warp would disagree in the last bit.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def piece_size(row):  # type: ignore[no-untyped-def]
    """Elements of a piece: 2048, or 1024 of fp32 logits."""
    size: tl.constexpr = LANES * 128 // row.dtype.element_ty.primitive_bitwidth
    return size


@triton.jit
def row_at(first, t, L, batch, stride, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where row t of (T, V) or (B, L, V) begins; T V exceeds 2^31 at V = 152k, T = 14k."""
    row = first + (t // L).to(tl.int64) * batch + (t % L).to(tl.int64) * stride
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return row


@triton.jit
def block_of(row, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The BLOCK elements at `row`: 16 tensors (LANES,) of fp32."""
    size: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    x = ()
    for p in tl.static_range(BLOCK // (LANES * size)):
        at = row + p * LANES * size
        if ALIGNED:
            x = x + _wide_piece(at)
        else:
            x = x + piece_of(at, 0, LANES * size)
    return x


@triton.jit
def piece_of(row, v, V):  # type: ignore[no-untyped-def]
    """The piece at column v, element by element, -inf from column V on: 8 tensors, or 4 of fp32 logits."""
    x = ()
    for i in tl.static_range(128 // row.dtype.element_ty.primitive_bitwidth):
        x = x + _column(row, column_at(row, v, i), V)
    return x


@triton.jit
def column_at(row, v, i):  # type: ignore[no-untyped-def]
    """The columns (LANES,) of tensor i of the piece at column v."""
    return v + tl.arange(0, LANES) * (128 // row.dtype.element_ty.primitive_bitwidth) + i


@triton.jit
def _column(row, at, V):  # type: ignore[no-untyped-def]
    return (tl.load(row + at, at < V, float("-inf")).to(tl.float32),)


@triton.jit
def _wide_piece(row):  # type: ignore[no-untyped-def]
    """The same of a whole piece, by 16-byte loads, as words of 4 bytes."""
    dtype: tl.constexpr = row.dtype.element_ty
    word = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(row.to(tl.pointer_type(tl.int32)) + word)
    even, odd = tl.split(tl.reshape(words, (LANES, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return _floats(w0, dtype) + _floats(w1, dtype) + _floats(w2, dtype) + _floats(w3, dtype)


@triton.jit
def _floats(word, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The one or two floats of a word.  bf16 is the upper half of fp32: one instruction each."""
    if dtype == tl.float32:
        return (word.to(tl.float32, bitcast=True),)
    elif dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(dtype, bitcast=True).to(tl.float32), high.to(dtype, bitcast=True).to(tl.float32)
