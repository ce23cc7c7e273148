"""The rows of linear_cross_entropy in Triton: one program per row, one read of the logits forward, one read
and one write backward.

Forward is that of token_logp at temperature 1: every lane keeps its own top and s = sum exp(z - top), merged
once at the end of the row.  Label smoothing also needs the mean of z; a lane sums z - top, moved along with
its top, so that an offset costs no digits.  Softcap's tanh is written out: exp2 for large arguments, a
polynomial where that would cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import on_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096  # 16 elements a thread
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
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
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # T V exceeds 2^31 at V = 152k, T = 14k
    row = logits + t * stride
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)  # sum of z - top
    n = 0.0  # how many this lane has seen
    for v in range(0, V, BLOCK):
        at = v + lane
        z = tl.load(row + at, at < V, float("-inf")).to(tl.float32)
        if CAP:
            z = tl.where(at < V, softcap * _tanh(z / softcap), LOWEST)
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        d = z - top
        e = tl.exp2(-tl.abs(d) * LOG2E)
        above = d > 0
        s = tl.where(above, e * s + 1.0, s + e)
        if SMOOTH:
            r = tl.where(above, r - n * d, tl.where(at < V, r + d, r))
            n += 1.0
        top = tl.where(above, z, top)
    high = tl.max(top, 0)
    s_row = tl.sum(tl.exp2((top - high) * LOG2E) * s, 0)
    s_row = tl.where(high <= LOWEST, float("nan"), s_row)  # nothing above -inf: no distribution
    ln = tl.log(s_row)
    y = tl.load(target + t)
    inside = (y >= 0) & (y < V)
    z = tl.load(row + y, inside, 0.0).to(tl.float32)
    if CAP:
        z = softcap * _tanh(z / softcap)
    each = (1.0 - smoothing) * (ln - (z - high))
    if SMOOTH:
        # the last block may have ended before this lane
        seen = n - tl.where((lane + (n - 1.0) * BLOCK) < V, 0.0, 1.0)
        sum_d = tl.sum(r + seen * (top - high), 0)
        # a banned token has no finite share of the smoothing
        sum_d = tl.where(sum_d < 0.5 * LOWEST, float("-inf"), sum_d)
        each += smoothing * (ln - sum_d / V)
    lse = high + ln
    tl.store(loss + t, tl.where(inside, each + z_loss * lse * lse, float("nan")))
    tl.store(m + t, high)
    tl.store(log_s + t, ln)


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
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row, to = logits + t * stride, out + t * out_stride
    high, ln, y, up = tl.load(m + t), tl.load(log_s + t), tl.load(target + t), tl.load(dloss + t)
    ln2 = ln * LOG2E
    share = 1.0 + 2.0 * z_loss * (high + ln)
    lane = tl.arange(0, BLOCK)
    for v in range(0, V, BLOCK):
        at = v + lane
        z = tl.load(row + at, at < V, float("-inf")).to(tl.float32)
        slope = 1.0
        if CAP:
            tanh = _tanh(z / softcap)
            slope, z = 1.0 - tanh * tanh, softcap * tanh
        g = share * tl.exp2(tl.fma(z - high, LOG2E, -ln2))
        if SMOOTH:
            g -= smoothing / V
        g = (g - tl.where(at == y, 1.0 - smoothing, 0.0)) * slope * up
        # over the row, or its front half: no block is stored before all warps have loaded theirs
        tl.debug_barrier()
        tl.store(to + at, g.to(out.dtype.element_ty), at < V)


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
                BLOCK=_block(V),
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
                BLOCK=_block(V),
                **OPTIONS,
            )
    return loss


def _block(V: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(V)))
