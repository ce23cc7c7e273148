"""token_logp in Triton: one program per row, one read of the logits forward, one read and one write backward.

Forward: every lane keeps (top, s, a) of what it saw, and the lanes are merged once, at the end of the row:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)

A lane moves its top at most once a block, for its 16 elements.  Then an element costs d = x - top, a clamp
that makes 0 * d of -inf zero, e = exp(d / tau), s += e and a += e d.
Backward: p (slope d + offset), with p = exp(d / tau) / s; the target's element, which has another formula, is
written last.  Exponentials are exp2 with 1 / (tau ln 2) folded in.

Instructions and bytes an element, entropy included (SASS, sm_90, the more of Triton 3.9 and 3.6):

               bf16           fp16           fp32           fp32 to bf16
    forward    9.1, 2 bytes   9.6, 2 bytes   8.2, 4 bytes
    backward   9.3, 4 bytes   8.8, 4 bytes   7.6, 8 bytes   7.7, 6 bytes

The rows are the grid, V and the temperature are runtime values: nothing is compiled again for another length.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import aligned_rows, on_device, row_layout, unit_rows
from fastrl.kernels._triton._vocabulary import (
    BLOCK,
    LANES,
    OPTIONS,
    block_of,
    piece_of,
    piece_size,
    rounded,
    row_at,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _add(x, top, s, a, k):  # type: ignore[no-untyped-def]
    """(top, s, a) of each lane with the tensors of `x`, one element a lane each."""
    new = top
    for i in tl.static_range(len(x)):
        new = tl.maximum(new, x[i])  # drops a NaN, which then reaches s through d

    down = top - new
    scale = tl.exp2(down * k)
    a = scale * (a + down * s)
    s_block, a_block = tl.zeros_like(s), tl.zeros_like(s)
    for i in tl.static_range(len(x)):
        d = tl.maximum(x[i] - new, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(d * k)
        s_block += e
        a_block += e * d
    return new, scale * s + s_block, a + a_block


@triton.jit
def _sums(row, tau, V, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit, and s and a relative to it."""
    k = LOG2E / tau
    top = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    a = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    for v in range(0, whole, BLOCK):
        top, s, a = _add(block_of(row + v, ALIGNED), top, s, a, k)
    for v in range(whole, V, piece_size(row)):
        top, s, a = _add(piece_of(row, v, V), top, s, a, k)

    high = tl.max(top, 0)
    share = tl.exp2((top - high) * k)
    s_row = tl.sum(rounded(share, s), 0)
    a_row = tl.sum(rounded(share, a + (top - high) * s), 0)
    return high, tl.where(high <= LOWEST, float("nan"), s_row), a_row  # nothing above -inf: no distribution


@triton.jit
def _statistics(row, y, tau, V, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """logp, entropy, m and log s of a row."""
    high, s, a = _sums(row, tau, V, ALIGNED)
    ln = tl.log(s)
    inside = (y >= 0) & (y < V)
    x = tl.load(row + y, inside, 0.0).to(tl.float32)
    scaled = high / tau
    log_s = ln - tl.fma(scaled, tau, -high) / tau  # relative to the rounded m, so that backward loses nothing
    return tl.where(inside, (x - high) / tau - ln, float("nan")), ln - a / (tau * s), scaled, log_s


@triton.jit
def _slope(x, terms, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """p (slope d + offset) of logits x; d = x - tau m, and that product is never rounded."""
    scaled, tau, k, ln2, slope, offset = terms
    d = tl.fma(-scaled, tau, x.to(tl.float32))
    weight = offset
    if ENTROPY:
        d = tl.maximum(d, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        weight = slope * d + offset
    return tl.exp2(tl.fma(d, k, -ln2)) * weight


@triton.jit
def _gradient(to, row, y, tau, scaled, ln, g, gh, h, V, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """One read, one write.  `to` may be `row`, or a narrower row in its front half: no block is stored before
    all warps have loaded theirs, and the stores of a block end before the loads of the next begin.
    """
    # slope d + offset = -g - gh (log p + h)
    terms = (scaled, tau, LOG2E / tau, ln * LOG2E, -gh / tau, gh * (ln - h) - g)
    inside = (y >= 0) & (y < V)
    at_target = g + _slope(tl.load(row + y, inside, float("-inf")), terms, ENTROPY)
    lane = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    for v in range(0, whole, BLOCK):
        dx = _slope(tl.load(row + v + lane), terms, ENTROPY)
        tl.debug_barrier()
        tl.store(to + v + lane, dx.to(to.dtype.element_ty))
    if whole < V:
        rest = whole + lane
        dx = _slope(tl.load(row + rest, rest < V, float("-inf")), terms, ENTROPY)
        tl.debug_barrier()
        tl.store(to + rest, dx.to(to.dtype.element_ty), rest < V)

    tl.debug_barrier()  # the target's element is written last
    tl.store(to + y, at_target.to(to.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["L"])
def forward_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    temperature,
    logp,
    entropy,
    m,
    log_s,
    V,
    L,
    batch,
    stride,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    t = tl.program_id(0)
    tau = tl.load(temperature + t)
    row = row_at(logits, t, L, batch, stride, ALIGNED)
    p, h, scaled, ln = _statistics(row, tl.load(target + t), tau, V, ALIGNED)
    tl.store(logp + t, p)
    tl.store(m + t, scaled)
    tl.store(log_s + t, ln)
    if ENTROPY:
        tl.store(entropy + t, h)


@triton.jit(do_not_specialize=["L"])
def backward_kernel(  # type: ignore[no-untyped-def]
    out,
    logits,
    target,
    temperature,
    dlogp,
    dentropy,
    entropy,
    m,
    log_s,
    V,
    L,
    out_batch,
    out_stride,
    batch,
    stride,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    t = tl.program_id(0)
    row = row_at(logits, t, L, batch, stride, ALIGNED)
    to = row_at(out, t, L, out_batch, out_stride, ALIGNED)
    tau = tl.load(temperature + t)
    gh, h = 0.0, 0.0
    if ENTROPY:
        gh, h = tl.load(dentropy + t) / tau, tl.load(entropy + t)
    y, g = tl.load(target + t), tl.load(dlogp + t) / tau
    _gradient(to, row, y, tau, tl.load(m + t), tl.load(log_s + t), g, gh, h, V, ENTROPY)


@triton.jit(do_not_specialize=["L"])
def fused_kernel(  # type: ignore[no-untyped-def]
    out,
    logits,
    target,
    temperature,
    dlogp,
    dentropy,
    logp,
    entropy,
    m,
    log_s,
    V,
    L,
    out_batch,
    out_stride,
    batch,
    stride,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Forward, then backward, of a row: the second read finds much of it in the L2 cache."""
    t = tl.program_id(0)
    row = row_at(logits, t, L, batch, stride, ALIGNED)
    to = row_at(out, t, L, out_batch, out_stride, ALIGNED)
    tau, y = tl.load(temperature + t), tl.load(target + t)
    p, h, scaled, ln = _statistics(row, y, tau, V, ALIGNED)
    tl.store(logp + t, p)
    tl.store(m + t, scaled)
    tl.store(log_s + t, ln)
    gh = 0.0
    if ENTROPY:
        tl.store(entropy + t, h)
        gh = tl.load(dentropy + t) / tau
    _gradient(to, row, y, tau, scaled, ln, tl.load(dlogp + t) / tau, gh, h, V, ENTROPY)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,)."""
    logits, T, V = unit_rows(logits), target.shape[0], logits.shape[-1]
    stats = _outputs(logits, T, entropy)
    if T:
        with on_device(logits):
            forward_kernel[(T,)](
                logits,
                target.contiguous(),
                temperature.contiguous(),
                *stats,
                V,
                *row_layout(logits),
                ENTROPY=entropy,
                ALIGNED=aligned_rows(logits),
                **OPTIONS,
            )
    return stats


def backward(dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """The gradient of the logits, of their shape."""
    return backward_into(
        torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), dlogp, dentropy, logits, *rest
    )


def backward_into(out: Tensor, dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """The same into `out`: the logits themselves, or a narrower dtype in the front of their rows."""
    if out.stride(-1) != 1:
        return out.copy_(backward(dlogp, dentropy, logits, *rest))
    logits = unit_rows(logits)
    target, temperature, entropy, m, log_s = rest
    vectors = (x.contiguous() for x in (target, temperature, dlogp, dentropy, entropy, m, log_s))
    _launch_over(backward_kernel, out, logits, *vectors, entropy=dentropy.numel() > 0)
    return out


def fused_into(
    out: Tensor, logits: Tensor, target: Tensor, temperature: Tensor, dlogp: Tensor, dentropy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward at once: the statistics of `forward`, and the gradient into `out`."""
    entropy = dentropy.numel() > 0
    if out.stride(-1) != 1 or logits.stride(-1) != 1:
        stats = forward(logits, target, temperature, entropy)
        backward_into(out, dlogp, dentropy, logits, target, temperature, *stats[1:])
        return stats
    stats = _outputs(logits, target.shape[0], entropy)
    vectors = (x.contiguous() for x in (target, temperature, dlogp, dentropy))
    _launch_over(fused_kernel, out, logits, *vectors, *stats, entropy=entropy)
    return stats


def _outputs(logits: Tensor, T: int, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    return logp, torch.empty(T if entropy else 0, dtype=torch.float32, device=logits.device), m, log_s


def _launch_over(
    kernel: Any, out: Tensor, logits: Tensor, target: Tensor, *vectors: Tensor, entropy: bool
) -> None:
    """A kernel that writes the gradient of `logits` to `out`, one program a row."""
    T, V = target.shape[0], logits.shape[-1]
    L, *strides = row_layout(logits)
    if T:
        with on_device(logits):
            kernel[(T,)](
                out,
                logits,
                target,
                *vectors,
                V,
                L,
                *row_layout(out)[1:],
                *strides,
                ENTROPY=entropy,
                ALIGNED=aligned_rows(logits) and aligned_rows(out),
                **OPTIONS,
            )
