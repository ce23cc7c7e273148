"""token_logp in Triton: one program per row, one read of the logits forward, one read and one write backward.

Every lane of the program keeps its own (top, s, a) of the elements it saw and the lanes are merged once, at the end of the row:

    top = max x      s = sum exp((x - top) / tau)      a = sum exp((x - top) / tau) (x - top)

A new element costs one exponential whichever of it and the lane's top is larger: e = exp(-|x - top| / tau) scales the old sums
when the element is the new top, and is the element's own share when it is not.  Exponentials are exp2 with 1 / (tau ln 2) folded in.
The rows are the grid, V and the temperature are runtime values: nothing is compiled again for another length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import TRITON_TYPES, Spec, on_device, unit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096  # 16 elements a thread: two 16-byte loads of bf16, four of fp32, in flight at once
COMMON = {"num_warps": 8, "enable_fp_fusion": True}
OPTIONS = dict.fromkeys(DTYPES, COMMON) | {torch.float16: COMMON | {"maxnreg": 128}}  # else ptxas aims at 64 for sm_100, and spills two
LOWEST = tl.constexpr(-1e30)  # stands for -inf: exp2 of its distance to any logit is 0, and that distance times V is finite
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    logits, target, temperature, logp, entropy, m, log_s, V, stride, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # T V exceeds 2^31 at V = 152k, T = 14k
    row = logits + t * stride
    tau = tl.load(temperature + t)
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
    s_row = tl.where(high <= LOWEST, float("nan"), s_row)  # nothing above -inf: no distribution
    ln = tl.log(s_row)
    y = tl.load(target + t)
    inside = (y >= 0) & (y < V)
    x = tl.load(row + y, inside, 0.0).to(tl.float32)
    scaled = high / tau
    tl.store(logp + t, tl.where(inside, (x - high) / tau - ln, float("nan")))
    tl.store(m + t, scaled)
    tl.store(log_s + t, ln - tl.fma(scaled, tau, -high) / tau)  # relative to the rounded m, so that backward loses nothing
    if ENTROPY:
        tl.store(entropy + t, ln - a_row / (tau * s_row))


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    out, logits, target, temperature, dlogp, dentropy, entropy, m, log_s, V, out_stride, stride,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row, to = logits + t * stride, out + t * out_stride
    tau = tl.load(temperature + t)
    scaled, ln, y = tl.load(m + t), tl.load(log_s + t), tl.load(target + t)
    k = LOG2E / tau
    ln2 = ln * LOG2E
    g = tl.load(dlogp + t) / tau
    gh, h = 0.0, 0.0
    if ENTROPY:
        gh, h = tl.load(dentropy + t) / tau, tl.load(entropy + t)
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
        tl.debug_barrier()  # `out` may be `logits`: no warp stores a block that another still loads
        tl.store(to + at, d.to(out.dtype.element_ty), at < V)


# --- launch -----------------------------------------------------------------------------------------
def forward(logits: Tensor, target: Tensor, temperature: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), m and log s, each (T,)."""
    logits = unit_rows(logits)
    T, V = logits.shape
    logp, m, log_s = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    h = torch.empty(T if entropy else 0, dtype=torch.float32, device=logits.device)
    if T:
        with on_device(logits):
            forward_kernel[(T,)](
                logits, target.contiguous(), temperature.contiguous(), logp, h, m, log_s, V, logits.stride(0),
                ENTROPY=entropy, BLOCK=block(V), **OPTIONS[logits.dtype],
            )  # fmt: skip
    return logp, h, m, log_s


def backward(dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """The gradient of the logits, (T, V)."""
    return backward_into(torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), dlogp, dentropy, logits, *rest)


def backward_into(out: Tensor, dlogp: Tensor, dentropy: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    """The same into `out`, which may be the logits themselves."""
    T, V = logits.shape
    if out.stride(1) != 1:
        return out.copy_(backward(dlogp, dentropy, logits, *rest))
    logits = unit_rows(logits)
    target, temperature, entropy, m, log_s = rest
    vectors = (x.contiguous() for x in (target, temperature, dlogp, dentropy, entropy, m, log_s))
    if T:
        with on_device(logits):
            backward_kernel[(T,)](
                out,
                logits,
                *vectors,
                V,
                out.stride(0),
                logits.stride(0),
                ENTROPY=dentropy.numel() > 0,
                BLOCK=block(V),
                **OPTIONS[logits.dtype],
            )
    return out


def block(V: int) -> int:
    """Columns a program holds at once: a power of two, so that a kernel is compiled for a handful of them."""
    return min(BLOCK, max(128, triton.next_power_of_2(V)))


# --- what it compiles to ----------------------------------------------------------------------------
def _specs() -> Iterator[Spec]:
    vectors = dict.fromkeys(("temperature", "logp", "dlogp", "dentropy", "entropy", "m", "log_s"), "*fp32")
    ints = {"target": "*i64", "V": "i32", "stride": "i32", "out_stride": "i32"}
    for dtype, entropy, V in itertools.product(DTYPES, (True, False), (151936, 50257)):
        name = TRITON_TYPES[dtype]
        for kernel, moves in ((forward_kernel, ("load",)), (backward_kernel, ("load", "store"))):
            yield Spec(
                kernel=kernel,
                case=f"{name[1:]} V={V}{' entropy' * entropy}",
                types=vectors | ints | {"logits": name, "out": name},
                constants={"ENTROPY": entropy, "BLOCK": BLOCK},
                divisible=V % 16 == 0,
                wide=moves if V % 16 == 0 else (),
                options=OPTIONS[dtype],
            )


COMPILE = tuple(_specs())
