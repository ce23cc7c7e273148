"""policy_loss in Triton: one kernel for value, both derivatives and the sums of all metrics, and a small one
that adds the sums up.

The kernel does not know the surrogate or the KL: their functions (kernels/_triton/surrogates.py) are
arguments of its compilation.  Programs take blocks of tokens in a fixed pattern, keep fp32 sums in their
lanes and store one row of them; the second kernel adds the rows in float64, in order.  With a ratio per
sequence, one program for each sequence computes its mean log-ratio first.  Blocks within T are read and
written without a mask, 16 bytes at a time; T itself is a runtime value, so a new T compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import launch_options, on_device
from fastrl.kernels._policy_arguments import Columns, Options
from fastrl.kernels._policy_metrics import METRICS
from fastrl.kernels._triton import surrogates
from fastrl.kernels._triton._policy_block import block_sums, count, merge, tokens_of
from fastrl.kernels.surrogates import SURROGATES, Surrogate

DTYPES = (torch.float32,)
ROWS = 128  # of four tokens: 16 bytes of each vector a thread
BLOCK = 4 * ROWS
PROGRAMS = 2048  # at most, whatever the device: the order of the sums is part of the result
ADDED = 512  # rows of sums added at once
OPTIONS = launch_options(num_warps=4)
COMBINE_OPTIONS = launch_options(num_warps=16)
# one place for each metric; the last, which follows from others, holds the loss
SUMS = tl.constexpr(len(METRICS))
LOSS, TOKENS, LARGEST, RATIO, WEIGHT, WEIGHT_SQ = (
    tl.constexpr(METRICS.index(m))
    for m in ("ess", "tokens", "ratio_max", "ratio_mean", "weight_mean", "weight_sq_mean")
)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["T"])
def token_kernel(  # type: ignore[no-untyped-def]
    logp,
    old_logp,
    advantage,
    weight,
    ref_logp,
    correction,
    entropy,
    mask,
    mean,
    dlogp,
    dentropy,
    partial,
    T,
    kl_coef,
    entropy_coef,
    p0,
    p1,
    p2,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    REF: tl.constexpr,
    CORRECTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASK: tl.constexpr,
    SEQUENCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    own, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    vectors = (logp, old_logp, advantage, weight, ref_logp, correction, entropy, mask, mean)
    params = (p0, p1, p2)
    none = tl.zeros((ROWS,), tl.float32)
    sums = (none, none, none, none, none, none, none, none, none, none, none, none, none, none, none, none)
    whole = T // (4 * ROWS)
    # The rest comes before the whole blocks: Triton 3.6 to 3.8 cannot compile a sum that a loop starts from
    # zeros and an `if` continues.
    if (own == whole % programs) & (whole * (4 * ROWS) < T):
        block = block_sums(
            whole * (4 * ROWS),
            vectors,
            dlogp,
            dentropy,
            T,
            kl_coef,
            entropy_coef,
            params,
            SURROGATE,
            KL,
            REF,
            CORRECTION,
            ENTROPY,
            MASK,
            SEQUENCE,
            False,
            ROWS,
        )
        sums = merge(sums, block)
    for i in range(own, whole, programs):
        block = block_sums(
            i * (4 * ROWS),
            vectors,
            dlogp,
            dentropy,
            T,
            kl_coef,
            entropy_coef,
            params,
            SURROGATE,
            KL,
            REF,
            CORRECTION,
            ENTROPY,
            MASK,
            SEQUENCE,
            True,
            ROWS,
        )
        sums = merge(sums, block)
    to = partial + own * SUMS
    for k in tl.static_range(SUMS):
        tl.store(to + k, tl.max(sums[k], 0) if k == LARGEST else tl.sum(sums[k], 0))


@triton.jit
def _at(x, place: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(tl.arange(0, SUMS) == place, x, 0.0), 0)


@triton.jit(do_not_specialize=["programs"])
def combine_kernel(partial, loss, metrics, programs, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.arange(0, SUMS)
    row = tl.arange(0, ADDED)
    sums = tl.zeros((ADDED, SUMS), tl.float64)
    for first in range(0, programs, ADDED):
        x = tl.load(
            partial + (first + row)[:, None] * SUMS + k[None, :], (first + row)[:, None] < programs, 0.0
        ).to(tl.float64)
        sums = tl.where(k[None, :] == LARGEST, tl.maximum(sums, x), sums + x)
    s = tl.where(k == LARGEST, tl.max(sums, 0), tl.sum(sums, 0))
    tl.store(loss, _at(s, LOSS).to(tl.float32))
    n = _at(s, TOKENS)
    mean = s / tl.maximum(n, 1.0)
    weight = _at(mean, WEIGHT)
    ess = weight * weight / tl.where(n > 0.0, _at(mean, WEIGHT_SQ), 1.0)
    largest = tl.where(_at(s, RATIO) == _at(s, RATIO), _at(s, LARGEST), float("nan"))  # a maximum drops NaN
    out = tl.where(k == TOKENS, n, tl.where(k == LARGEST, largest, tl.where(k == LOSS, ess, mean)))
    tl.store(metrics + k, out.to(tl.float32))


@triton.jit
def _drift(  # type: ignore[no-untyped-def]
    block, start, end, logp, old_logp, mask, MASK: tl.constexpr, WITHIN: tl.constexpr, ROWS: tl.constexpr
):
    """The sum of logp - old_logp over a block's live tokens of one sequence, and their number; (ROWS,)."""
    at = tokens_of(block * (4 * ROWS), ROWS)
    inside = tl.full((ROWS, 4), 1, tl.int1)
    if not WITHIN:
        inside = (at >= start) & (at < end)
    live = inside
    if MASK:
        live = inside & (tl.load(mask + at, inside, 0) != 0)
    d = tl.where(live, tl.load(logp + at, inside, 0.0) - tl.load(old_logp + at, inside, 0.0), 0.0)
    return tl.sum(d.to(tl.float64), 1), count(live)


@triton.jit
def mean_kernel(logp, old_logp, mask, ends, mean, MASK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sequence's mean of logp - old_logp over live tokens, written for each of its tokens."""
    s = tl.program_id(0)
    start, end = tl.load(ends + s).to(tl.int64), tl.load(ends + s + 1).to(tl.int64)
    total, tokens = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float32)
    for block in range(start // (4 * ROWS), tl.cdiv(end, 4 * ROWS)):
        if (block * (4 * ROWS) >= start) & ((block + 1) * (4 * ROWS) <= end):
            d, n = _drift(block, start, end, logp, old_logp, mask, MASK, True, ROWS)
        else:
            d, n = _drift(block, start, end, logp, old_logp, mask, MASK, False, ROWS)
        total += d
        tokens += n
    value = (tl.sum(total, 0) / tl.maximum(tl.sum(tokens, 0), 1.0)).to(tl.float32)
    for block in range(start // (4 * ROWS), tl.cdiv(end, 4 * ROWS)):
        at = tokens_of(block * (4 * ROWS), ROWS)
        out = tl.zeros((ROWS, 4), tl.float32) + value
        if (block * (4 * ROWS) >= start) & ((block + 1) * (4 * ROWS) <= end):
            tl.store(mean + at, out)
        else:
            tl.store(mean + at, out, (at >= start) & (at < end))


# --- launch -----------------------------------------------------------------------------------------
def forward(c: Columns, o: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), metrics (M,), d loss / d logp (T,) and d loss / d entropy (T,), empty without entropy."""
    c = Columns(*(x.contiguous() for x in c))
    T = c.logp.shape[0]
    programs = min(PROGRAMS, max(1, triton.cdiv(T, BLOCK)))
    loss, metrics, partial = (
        c.logp.new_empty(shape) for shape in ((), len(METRICS), (programs, len(METRICS)))
    )
    dlogp, dentropy = torch.empty_like(c.logp), torch.empty_like(c.entropy)
    mean = torch.empty_like(c.logp) if o.ratio == "sequence" else dlogp
    flags = {"MASK": c.mask.numel() > 0, "ROWS": ROWS}
    with on_device(c.logp):
        if o.ratio == "sequence" and T:
            mean_kernel[(c.cu_seqlens.shape[0] - 1,)](
                c.logp, c.old_logp, c.mask, c.cu_seqlens, mean, **flags, **OPTIONS
            )
        token_kernel[(programs,)](
            c.logp,
            c.old_logp,
            c.advantage,
            c.weight,
            c.ref_logp,
            c.correction,
            c.entropy,
            c.mask,
            mean,
            dlogp,
            dentropy,
            partial,
            T,
            o.kl_coef,
            o.entropy_coef,
            *o.three_params,
            REF=c.ref_logp.numel() > 0,
            CORRECTION=c.correction.numel() > 0,
            ENTROPY=c.entropy.numel() > 0,
            SEQUENCE=o.ratio == "sequence",
            **columns(SURROGATES[o.surrogate], o.kl),
            **flags,
            **OPTIONS,
        )
        combine_kernel[(1,)](partial, loss, metrics, programs, ADDED=ADDED, **COMBINE_OPTIONS)
    return loss, metrics, dlogp, dentropy


def columns(row: Surrogate, kl: str) -> dict[str, Any]:
    """The functions that the token kernel is compiled with."""
    named = isinstance(row.triton, str)
    return {
        "SURROGATE": getattr(surrogates, str(row.triton)) if named else row.triton,
        "KL": surrogates.KLS[kl] if kl else None,
    }
