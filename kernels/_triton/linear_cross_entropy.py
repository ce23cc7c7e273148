"""The rows of linear_cross_entropy in Triton: one program per row, one read of the logits forward, one read
and one write backward.

Forward is that of token_logp at temperature 1: every lane keeps its own top and s = sum exp(z - top), merged
once at the end of the row.  Label smoothing also needs the mean of z; a lane sums z - top, moved along with
its top, so that an offset costs no digits.  Softcap's tanh is written out: exp2 for large arguments, a
polynomial where that would cancel.  The backward writes the target's element last.

Instructions an element without softcap, plain and with smoothing (SASS, sm_90, the more of Triton 3.9 and
3.6):

                bf16         fp32         fp32 to bf16
    forward     6.9, 9.0     6.0, 8.2
    backward    8.1          6.6          6.8
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import aligned_rows, on_device
from fastrl.kernels._triton._vocabulary import (
    BLOCK,
    LANES,
    OPTIONS,
    block_of,
    column_at,
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
def _tanh(u):  # type: ignore[no-untyped-def]
    """Within 2 ulp: 1 - 2 / (exp(2 |u|) + 1), and below 0.625, where that loses digits, an odd minimax
    polynomial.
    """
    size, q = tl.abs(u), u * u
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    p = (
        ((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1
    ) * q - 3.33332819422e-1
    r = tl.where(size < 0.625, size + size * q * p, large)
    return tl.where(u < 0, -r, r)


@triton.jit
def _capped(z, softcap, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _add(x, state, softcap, row, v, V, SMOOTH: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(top, s, r, n) of each lane with the tensors of `x`; MASKED: of the piece at column v, which ends at V.

    r is the sum of z - top, n its number of terms.
    """
    top, s, r, n = state
    new = top
    for i in tl.static_range(len(x)):
        z = _capped(x[i], softcap, CAP)
        if MASKED:
            z = tl.where(column_at(row, v, i) < V, z, float("-inf"))
        new = tl.maximum(new, z)  # drops a NaN, which then reaches s through d

    down = top - new
    s *= tl.exp2(down * LOG2E)
    if SMOOTH:
        r += n * down
    for i in tl.static_range(len(x)):
        z = _capped(x[i], softcap, CAP)
        if MASKED:
            z = tl.where(column_at(row, v, i) < V, z, float("-inf"))
        d = z - new
        s += tl.exp2(d * LOG2E)
        if SMOOTH:
            d = tl.maximum(d, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            if MASKED:
                d = tl.where(column_at(row, v, i) < V, d, 0.0)
                n += tl.where(column_at(row, v, i) < V, 1.0, 0.0)
            r += d
    if not MASKED:
        n += len(x)
    return new, s, r, n


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    logits,
    target,
    loss,
    m,
    log_s,
    V,
    stride,
    smoothing,
    softcap,
    z_loss,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    t = tl.program_id(0)
    row = row_at(logits, t, t + 1, 0, stride, ALIGNED)
    nothing = tl.zeros((LANES,), tl.float32)
    state = (nothing + LOWEST, nothing, nothing, nothing)
    whole = V // BLOCK * BLOCK
    for v in range(0, whole, BLOCK):
        state = _add(block_of(row + v, ALIGNED), state, softcap, row, v, V, SMOOTH, CAP, False)
    for v in range(whole, V, piece_size(row)):
        state = _add(piece_of(row, v, V), state, softcap, row, v, V, SMOOTH, CAP, True)

    top, s, r, n = state
    high = tl.max(top, 0)
    s_row = tl.sum(rounded(tl.exp2((top - high) * LOG2E), s), 0)
    s_row = tl.where(high <= LOWEST, float("nan"), s_row)  # nothing above -inf: no distribution
    ln = tl.log(s_row)
    y = tl.load(target + t)
    inside = (y >= 0) & (y < V)
    z = _capped(tl.load(row + y, inside, 0.0).to(tl.float32), softcap, CAP)
    each = (1.0 - smoothing) * (ln - (z - high))
    if SMOOTH:
        sum_d = tl.sum(r + n * (top - high), 0)
        # a banned token has no finite share of the smoothing
        sum_d = tl.where(sum_d < 0.5 * LOWEST, float("-inf"), sum_d)
        each += smoothing * (ln - sum_d / V)
    lse = high + ln
    tl.store(loss + t, tl.where(inside, each + z_loss * lse * lse, float("nan")))
    tl.store(m + t, high)
    tl.store(log_s + t, ln)


@triton.jit
def _gradient(x, taken, terms, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(share p - taken) times the slope of softcap and the upstream gradient."""
    high, ln2, share, softcap, up = terms
    z = x.to(tl.float32)
    slope = up
    if CAP:
        tanh = _tanh(z / softcap)
        slope, z = up * (1.0 - tanh * tanh), softcap * tanh
    return (share * tl.exp2(tl.fma(z - high, LOG2E, -ln2)) - taken) * slope


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    out,
    logits,
    dloss,
    target,
    m,
    log_s,
    V,
    out_stride,
    stride,
    smoothing,
    softcap,
    z_loss,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    t = tl.program_id(0)
    row = row_at(logits, t, t + 1, 0, stride, ALIGNED)
    to = row_at(out, t, t + 1, 0, out_stride, ALIGNED)
    high, ln, y = tl.load(m + t), tl.load(log_s + t), tl.load(target + t)
    share = 1.0 + 2.0 * z_loss * (high + ln)
    terms = (high, ln * LOG2E, share, softcap, tl.load(dloss + t))
    taken = 0.0
    if SMOOTH:
        taken = smoothing / V
    inside = (y >= 0) & (y < V)
    at_target = _gradient(tl.load(row + y, inside, 0.0), taken + (1.0 - smoothing), terms, CAP)

    # over the row, or its front half: no block is stored before all warps have loaded theirs
    lane = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    for v in range(0, whole, BLOCK):
        dx = _gradient(tl.load(row + v + lane), taken, terms, CAP)
        tl.debug_barrier()
        tl.store(to + v + lane, dx.to(to.dtype.element_ty))
    if whole < V:
        rest = whole + lane
        dx = _gradient(tl.load(row + rest, rest < V, float("-inf")), taken, terms, CAP)
        tl.debug_barrier()
        tl.store(to + rest, dx.to(to.dtype.element_ty), rest < V)

    tl.debug_barrier()  # the target's element is written last
    tl.store(to + y, at_target.to(to.dtype.element_ty), inside)


# --- launch -----------------------------------------------------------------------------------------
def forward(
    logits: Tensor, target: Tensor, smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, m and log s of each row, (N,) each; the rows of the logits are contiguous."""
    N, V = logits.shape
    loss, m, log_s = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(3))
    if N:
        with on_device(logits):
            forward_kernel[(N,)](
                logits,
                target.contiguous(),
                loss,
                m,
                log_s,
                V,
                logits.stride(0),
                smoothing,
                softcap or 1.0,
                z_loss,
                SMOOTH=smoothing != 0,
                CAP=softcap != 0,
                ALIGNED=aligned_rows(logits),
                **OPTIONS,
            )
    return loss, m, log_s


def fused_into(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    dloss: Tensor,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """Loss (N,); the gradient for an upstream gradient `dloss` (N,) goes to `out`, which may lie over the
    logits.  Contiguous rows.
    """
    N, V = logits.shape
    loss, m, log_s = forward(logits, target, smoothing, softcap, z_loss)
    if N:
        with on_device(logits):
            backward_kernel[(N,)](
                out,
                logits,
                dloss.contiguous(),
                target.contiguous(),
                m,
                log_s,
                V,
                out.stride(0),
                logits.stride(0),
                smoothing,
                softcap or 1.0,
                z_loss,
                SMOOTH=smoothing != 0,
                CAP=softcap != 0,
                ALIGNED=aligned_rows(logits) and aligned_rows(out),
                **OPTIONS,
            )
    return loss
