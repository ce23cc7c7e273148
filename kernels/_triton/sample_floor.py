"""The floor of a row under sample's filters, in Triton: one program per row, no sorting.

A logit is mapped to an unsigned integer of the same order.  The largest integer with enough at or above it
(top_k tokens, or top_p of the mass) is found three bits at a time: a pass adds up what lies at or above each
of eight thresholds, and the digit is how many of them have enough.  fp32 takes 11 passes, bf16 6, fp16 7, for
any row.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device

# columns at once: 16 bytes a thread
SEARCH = {torch.float32: 1024, torch.bfloat16: 2048, torch.float16: 2048}
STOP = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 12}  # low bits of the fp32 form, always 0
OPTIONS = launch_options(num_warps=8)
ONE = tl.constexpr(0x3FF0000000000000)  # the bits of 1.0; numbers between 0 and 1 have lower bits


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def ordered(x):  # type: ignore[no-untyped-def]
    """fp32 as uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def logit(key, STOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 number that `ordered` maps to `key`."""
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key)
    return ((bits >> STOP) << STOP).to(tl.float32, bitcast=True)


@triton.jit
def mass(x, top, tau, among, bits):  # type: ignore[no-untyped-def]
    """The integer mass of each token that is not below `among`."""
    d = tl.div_rn(x - top, tau)
    scale = (tl.full((), 1, tl.int64) << bits).to(tl.float64)
    return tl.where(d >= among, tl.exp(d.to(tl.float64)) * scale, 0.0).to(tl.int64)


@triton.jit
def threshold(  # type: ignore[no-untyped-def]
    row, V, limit, top, tau, among, bits, MASS: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key with at least `limit` at or above it: by count of logits, or by MASS."""
    lane = tl.arange(0, BLOCK)[None, :]
    step = tl.arange(0, 8)[:, None].to(tl.uint32)
    found = tl.full((), 0, tl.uint32)
    for i in range((34 - STOP) // 3):
        shift = tl.maximum(29 - 3 * i, STOP)
        least = found + (step << shift)
        above = tl.zeros((8, BLOCK), tl.int64 if MASS else tl.int32)
        for v in range(0, V, BLOCK):
            x = tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32)
            weight = mass(x, top, tau, among, bits) if MASS else 1
            above += tl.where(ordered(x) >= least, weight, 0)
        enough = tl.sum((tl.sum(above, 1) >= limit).to(tl.int32), 0)
        found += (tl.maximum(enough, 1) - 1).to(tl.uint32) << shift
    return logit(found, STOP)


@triton.jit(do_not_specialize=["top_k", "top_p", "bits"])
def floor_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    row_top,
    row_floor,
    V,
    stride,
    top_k,
    top_p,
    log_min_p,
    bits,
    STOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit of a row, and the d below which its tokens are filtered out.

    top_p is passed as the bits of a double.
    """
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * stride
    tau = tl.load(temperature + b)
    greedy = tau == 0
    tau = tl.where(greedy, 1.0, tau)
    lane = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for v in range(0, V, BLOCK):
        high = tl.maximum(high, tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32))
    top = tl.max(high, 0)
    among = tl.full((), float("-inf"), tl.float32)
    floor = tl.maximum(among, log_min_p)
    if top_k > 0:
        among = tl.div_rn(threshold(row, V, top_k, top, tau, among, bits, False, STOP, BLOCK) - top, tau)
    if top_p < ONE:
        total = tl.zeros((BLOCK,), tl.int64)
        for v in range(0, V, BLOCK):
            total += mass(
                tl.load(row + v + lane, v + lane < V, float("-inf")).to(tl.float32), top, tau, among, bits
            )
        limit = top_p.to(tl.float64, bitcast=True) * tl.sum(total, 0).to(tl.float64)
        x = threshold(row, V, tl.maximum(limit.to(tl.int64), 1), top, tau, among, bits, True, STOP, BLOCK)
        floor = tl.maximum(floor, tl.div_rn(x - top, tau))
    floor = tl.maximum(floor, among)
    tl.store(row_top + b, top)
    tl.store(row_floor + b, tl.where(greedy, float("-inf"), floor))


# --- launch -----------------------------------------------------------------------------------------
def floors(
    logits: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and the d below which its tokens are filtered out, each (B,)."""
    B, V = logits.shape
    top, floor = (torch.empty(B, dtype=torch.float32, device=logits.device) for _ in range(2))
    p_bits = struct.unpack("<q", struct.pack("<d", top_p))[0]  # a float argument would be rounded to fp32
    with on_device(logits):
        floor_kernel[(B,)](
            logits,
            temperature,
            top,
            floor,
            V,
            logits.stride(0),
            top_k if top_k < V else 0,
            p_bits,
            math.log(min_p) if min_p else -math.inf,
            mass_bits(V),
            STOP=STOP[logits.dtype],
            BLOCK=block(V, SEARCH[logits.dtype]),
            **OPTIONS,
        )
    return top, floor


def block(V: int, most: int) -> int:
    """Columns a program holds at once: a power of two, so that a kernel is compiled for a handful of them."""
    return min(most, max(128, triton.next_power_of_2(V)))


def mass_bits(V: int) -> int:
    """n such that V masses of up to 2^n add up to less than 2^62, as in sample.py."""
    return 62 - V.bit_length()
