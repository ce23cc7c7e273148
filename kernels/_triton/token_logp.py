"""token_logp in Triton: one program per row, one read of the logits forward, one read and one write backward.

Every lane of the program keeps its own (top, s, a) of the elements it saw, and the lanes are merged once, at
the end of the row:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)

A new element costs one exponential, e = exp(-|x - top| / tau): it scales the old sums when the element is the
new top, and is the share of the element when it is not.  Exponentials are exp2 with 1 / (tau ln 2) folded in.
The rows are the grid, V and the temperature are runtime values: nothing is compiled again for another length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import TRITON_TYPES, Spec, on_device, row_layout, unit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096  # 16 elements a thread: two 16-byte loads of bf16, four of fp32, in flight at once
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True, "maxnreg": 128}  # without maxnreg ptxas may spill a few
# stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _row(first, t, L, batch, stride):  # type: ignore[no-untyped-def]
    """Where row t of (T, V) or (B, L, V) begins; T V exceeds 2^31 at V = 152k, T = 14k."""
    return first + (t // L).to(tl.int64) * batch + (t % L).to(tl.int64) * stride


@triton.jit
def _sums(row, tau, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit, and s and a relative to it."""
    k = LOG2E / tau
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    a = tl.zeros((BLOCK,), tl.float32)
    for v in range(0, V, BLOCK):
        at = v + lane
        x = tl.load(row + at, at < V, float("-inf")).to(tl.float32)
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        d = x - top
        e = tl.exp2(-tl.abs(d) * k)
        above = d > 0
        a = tl.where(above, e * (a - d * s), a + e * d)
        s = tl.where(above, e * s + 1.0, s + e)
        top = tl.where(above, x, top)
    high = tl.max(top, 0)
    share = tl.exp2((top - high) * k)
    s_row = tl.sum(share * s, 0)
    a_row = tl.sum(share * (a + (top - high) * s), 0)
    return high, tl.where(high <= LOWEST, float("nan"), s_row), a_row  # nothing above -inf: no distribution


@triton.jit
def _statistics(row, y, tau, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """logp, entropy, m and log s of a row."""
    high, s, a = _sums(row, tau, V, BLOCK)
    ln = tl.log(s)
    inside = (y >= 0) & (y < V)
    x = tl.load(row + y, inside, 0.0).to(tl.float32)
    scaled = high / tau
    log_s = ln - tl.fma(scaled, tau, -high) / tau  # relative to the rounded m, so that backward loses nothing
    return tl.where(inside, (x - high) / tau - ln, float("nan")), ln - a / (tau * s), scaled, log_s


@triton.jit
def _gradient(to, row, y, tau, scaled, ln, g, gh, h, V, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One read, one write.  `to` may be `row`, or a narrower row in its front half: no block is stored before
    all warps have loaded theirs, and the stores of a block end before the loads of the next begin.
    """
    k = LOG2E / tau
    ln2 = ln * LOG2E
    lane = tl.arange(0, BLOCK)
    for v in range(0, V, BLOCK):
        at = v + lane
        x = tl.load(row + at, at < V, float("-inf")).to(tl.float32)
        u = tl.fma(tl.fma(-scaled, tau, x), k, -ln2)  # log2 p; the product scaled * tau is never rounded
        p = tl.exp2(u)
        d = g
        if ENTROPY:
            d += gh * (tl.where(p > 0, u * LN2, 0.0) + h)
        d = tl.where(at == y, g, 0.0) - p * d
        tl.debug_barrier()
        tl.store(to + at, d.to(to.dtype.element_ty), at < V)


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
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0)
    tau = tl.load(temperature + t)
    p, h, scaled, ln = _statistics(_row(logits, t, L, batch, stride), tl.load(target + t), tau, V, BLOCK)
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
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0)
    row, to = _row(logits, t, L, batch, stride), _row(out, t, L, out_batch, out_stride)
    tau = tl.load(temperature + t)
    gh, h = 0.0, 0.0
    if ENTROPY:
        gh, h = tl.load(dentropy + t) / tau, tl.load(entropy + t)
    y, g = tl.load(target + t), tl.load(dlogp + t) / tau
    _gradient(to, row, y, tau, tl.load(m + t), tl.load(log_s + t), g, gh, h, V, ENTROPY, BLOCK)


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
    BLOCK: tl.constexpr,
):
    """Forward, then backward, of a row: the second read finds much of it in the L2 cache."""
    t = tl.program_id(0)
    row, to = _row(logits, t, L, batch, stride), _row(out, t, L, out_batch, out_stride)
    tau, y = tl.load(temperature + t), tl.load(target + t)
    p, h, scaled, ln = _statistics(row, y, tau, V, BLOCK)
    tl.store(logp + t, p)
    tl.store(m + t, scaled)
    tl.store(log_s + t, ln)
    gh = 0.0
    if ENTROPY:
        tl.store(entropy + t, h)
        gh = tl.load(dentropy + t) / tau
    tl.debug_barrier()  # every warp has read the target's logit
    _gradient(to, row, y, tau, scaled, ln, tl.load(dlogp + t) / tau, gh, h, V, ENTROPY, BLOCK)


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
                BLOCK=block(V),
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
                BLOCK=block(V),
                **OPTIONS,
            )


def block(V: int) -> int:
    """Columns a program holds at once: a power of two, so that a kernel is compiled for a handful of them."""
    return min(BLOCK, max(128, triton.next_power_of_2(V)))


# --- what it compiles to ----------------------------------------------------------------------------
def _specs() -> Iterator[Spec]:
    types = dict.fromkeys(("temperature", "logp", "dlogp", "dentropy", "entropy", "m", "log_s"), "*fp32") | {
        "target": "*i64"
    }
    types |= dict.fromkeys(("V", "L", "batch", "stride", "out_batch", "out_stride"), "i32")
    kernels = (
        (forward_kernel, ("load",)),
        (backward_kernel, ("load", "store")),
        (fused_kernel, ("load", "store")),
    )
    narrow = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]  # (logits, gradient)
    for (dtype, out), entropy, V in itertools.product(
        [*((d, d) for d in DTYPES), *narrow], (True, False), (151936, 50257)
    ):
        name, to = TRITON_TYPES[dtype], TRITON_TYPES[out]
        for kernel, moves in kernels:
            if dtype != out and kernel is forward_kernel:
                continue
            yield Spec(
                kernel=kernel,
                case=f"{name[1:]}{f' to {to[1:]}' * (dtype != out)} V={V}{' entropy' * entropy}",
                types=types | {"logits": name, "out": to},
                constants={"ENTROPY": entropy, "BLOCK": BLOCK},
                divisible=V % 16 == 0,
                wide=moves if V % 16 == 0 else (),
                options=OPTIONS,
            )


COMPILE = tuple(_specs())
