"""policy_loss in Triton: one kernel for value, both derivatives and the sums of all metrics, and a tiny one
that adds the sums up.

Which surrogate and which KL it is, the kernel does not know: their twins (kernels/_triton/surrogates.py) are
arguments.  Programs take blocks of tokens in a fixed pattern, keep fp32 sums in their lanes and leave one row
of them; the second kernel adds the rows in float64, in order.  A sequence's mean log-ratio comes first, from
one program for each sequence.  Blocks within T are read and written without a mask, 16 bytes at a time; T
itself is a runtime value and compiles nothing again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import Spec, on_device
from fastrl.kernels._policy_arguments import Columns, Options
from fastrl.kernels._policy_metrics import METRICS
from fastrl.kernels._triton import surrogates as twins
from fastrl.kernels.surrogates import SURROGATES, Surrogate

DTYPES = (torch.float32,)
ROWS = 128  # of four tokens: 16 bytes of each vector a thread
BLOCK = 4 * ROWS
PROGRAMS = 2048  # at most, whatever the device: the order of the sums is part of the result
ADDED = 512  # rows of sums that are added at once
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
COMBINE_OPTIONS = OPTIONS | {"num_warps": 16}
# one place for each metric; the last, which follows from others, holds the loss
SUMS = tl.constexpr(len(METRICS))
LOSS, TOKENS, LARGEST, RATIO, WEIGHT, WEIGHT_SQ = (
    tl.constexpr(METRICS.index(m))
    for m in ("ess", "tokens", "ratio_max", "ratio_mean", "weight_mean", "weight_sq_mean")
)


# --- kernels ----------------------------------------------------------------------------------------
@triton.jit
def _column(vector, at, inside, live):  # type: ignore[no-untyped-def]
    """A block of a vector, 0 where a token is masked out or not there."""
    return tl.where(live, tl.load(vector + at, inside, 0.0), 0.0)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    first,
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
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the derivatives of one block, and return its sums, (ROWS,) each, in the order of METRICS with the
    loss at the end.
    """
    at = first + (tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :])
    inside = tl.full((ROWS, 4), 1, tl.int1)  # known when it is compiled: no access is masked
    if not WHOLE:
        inside = at < T
    live = inside
    if MASK:
        live = inside & (tl.load(mask + at, inside, 0) != 0)
    p, a, w = (
        _column(logp, at, inside, live),
        _column(advantage, at, inside, live),
        _column(weight, at, inside, live),
    )
    token_d = p - _column(old_logp, at, inside, live)
    d = twins.bounded(token_d)
    token_r, old = twins.exp_and_rest(d)
    old += d - token_d  # 0 but beyond the bound
    r = token_r
    if SEQUENCE:
        d = twins.bounded(_column(mean, at, inside, live))
        r, _ = twins.exp_and_rest(d)
    value, slope, low, high, cap = SURROGATE(d, r, p, a, p0, p1, p2)
    r = tl.where(live, r, 0.0)
    importance = r
    if CORRECTION:
        k = _column(correction, at, inside, live)
        value, slope, importance = value * k, slope * k, r * k
    value, slope = -value, -slope
    e, k3, h = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
    if REF:
        e = p - _column(ref_logp, at, inside, live)
        back = twins.bounded(-e)
        _, rest = twins.exp_and_rest(back)
        k3 = rest + (back + e)
        if KL is not None:
            kl, kl_slope = KL(e, rest + back, k3, token_r)
            value, slope = value + kl_coef * kl, slope + kl_coef * kl_slope
    if ENTROPY:
        h = _column(entropy, at, inside, live)
        # without a weight it is only reported
        value = tl.where(entropy_coef != 0.0, value - entropy_coef * h, value)
        tl.store(dentropy + at, w * -entropy_coef, inside)
    tl.store(dlogp + at, slope * w, inside)
    half_square, squared, loss = 0.5 * token_d * token_d, importance * importance, value * w
    return (
        _count(live),
        _count(live & low),
        _count(live & high),
        _count(live & cap),
        tl.sum(r, 1),
        tl.max(r, 1),
        tl.sum(half_square, 1),
        tl.sum(-token_d, 1),
        tl.sum(old, 1),
        tl.sum(e, 1),
        tl.sum(k3, 1),
        tl.sum(h, 1),
        tl.sum(a, 1),
        tl.sum(importance, 1),
        tl.sum(squared, 1),
        tl.sum(loss, 1),
    )


@triton.jit
def _count(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(x, 1.0, 0.0), 1)


@triton.jit
def _merge(x, y):  # type: ignore[no-untyped-def]
    return (
        x[0] + y[0],
        x[1] + y[1],
        x[2] + y[2],
        x[3] + y[3],
        x[4] + y[4],
        tl.maximum(x[5], y[5]),
        x[6] + y[6],
        x[7] + y[7],
        x[8] + y[8],
        x[9] + y[9],
        x[10] + y[10],
        x[11] + y[11],
        x[12] + y[12],
        x[13] + y[13],
        x[14] + y[14],
        x[15] + y[15],
    )


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
    none = tl.zeros((ROWS,), tl.float32)
    sums = (none, none, none, none, none, none, none, none, none, none, none, none, none, none, none, none)
    whole = T // (4 * ROWS)
    for i in range(own, whole, programs):
        sums = _merge(
            sums,
            _block(
                i * (4 * ROWS),
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
                T,
                kl_coef,
                entropy_coef,
                p0,
                p1,
                p2,
                SURROGATE,
                KL,
                REF,
                CORRECTION,
                ENTROPY,
                MASK,
                SEQUENCE,
                True,
                ROWS,
            ),
        )
    if (own == whole % programs) & (whole * (4 * ROWS) < T):
        sums = _merge(
            sums,
            _block(
                whole * (4 * ROWS),
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
                T,
                kl_coef,
                entropy_coef,
                p0,
                p1,
                p2,
                SURROGATE,
                KL,
                REF,
                CORRECTION,
                ENTROPY,
                MASK,
                SEQUENCE,
                False,
                ROWS,
            ),
        )
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
    block, start, end, logp, old_logp, mask, MASK: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr
):
    """The sum of logp - old_logp over a block's live tokens of one sequence, and their number,
    (ROWS,) each.
    """
    at = block * (4 * ROWS) + (tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :])
    inside = tl.full((ROWS, 4), 1, tl.int1)
    if not WHOLE:
        inside = (at >= start) & (at < end)
    live = inside
    if MASK:
        live = inside & (tl.load(mask + at, inside, 0) != 0)
    d = tl.where(live, tl.load(logp + at, inside, 0.0) - tl.load(old_logp + at, inside, 0.0), 0.0)
    return tl.sum(d.to(tl.float64), 1), _count(live)


@triton.jit
def mean_kernel(logp, old_logp, mask, ends, mean, MASK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sequence's mean of logp - old_logp over live tokens, written for each of its tokens."""
    s = tl.program_id(0)
    start, end = tl.load(ends + s).to(tl.int64), tl.load(ends + s + 1).to(tl.int64)
    total, count = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float32)
    for block in range(start // (4 * ROWS), tl.cdiv(end, 4 * ROWS)):
        if (block * (4 * ROWS) >= start) & ((block + 1) * (4 * ROWS) <= end):
            d, n = _drift(block, start, end, logp, old_logp, mask, MASK, True, ROWS)
        else:
            d, n = _drift(block, start, end, logp, old_logp, mask, MASK, False, ROWS)
        total += d
        count += n
    value = (tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)).to(tl.float32)
    for block in range(start // (4 * ROWS), tl.cdiv(end, 4 * ROWS)):
        at = block * (4 * ROWS) + (tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :])
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
        "SURROGATE": getattr(twins, str(row.triton)) if named else row.triton,
        "KL": twins.KL_TWINS[kl] if kl else None,
    }


# --- what it compiles to ----------------------------------------------------------------------------
TYPES = (
    dict.fromkeys(
        (
            "logp",
            "old_logp",
            "advantage",
            "weight",
            "ref_logp",
            "correction",
            "entropy",
            "mean",
            "dlogp",
            "dentropy",
        ),
        "*fp32",
    )
    | dict.fromkeys(("partial", "loss", "metrics"), "*fp32")
    | dict.fromkeys(("kl_coef", "entropy_coef", "p0", "p1", "p2"), "fp32")
    | {"mask": "*i1", "ends": "*i32", "T": "i32", "programs": "i32"}
)


def _token(name: str, kl: str, switches: str) -> Spec:
    """The token kernel of a row, a KL and the inputs that are there: m(ask), c(orrection), e(ntropy),
    s(equence).
    """
    flags = {"MASK": "m", "CORRECTION": "c", "ENTROPY": "e", "SEQUENCE": "s"}
    constants = {"ROWS": ROWS, "REF": bool(kl)} | {n: letter in switches for n, letter in flags.items()}
    return _spec(
        token_kernel, f"{name} {kl or '-'} {switches or '-'}", constants | columns(SURROGATES[name], kl)
    )


def _spec(kernel: Any, case: str, constants: dict[str, Any]) -> Spec:
    moves = ("load", "store")
    return Spec(
        kernel=kernel,
        case=case,
        types=TYPES,
        constants=constants,
        divisible=True,
        wide=moves,
        options=OPTIONS,
    )


def _specs() -> Iterator[Spec]:
    """Every row and every KL once, the headline, and all inputs together."""
    yield from (_token(name, "", "m") for name in SURROGATES)
    yield from (_token("clip", kl, "mces") for kl in twins.KL_TWINS)
    yield from (_token(name, "k3", "mces") for name in ("sapo", "luffy_off"))
    for masked in (True, False):
        yield _spec(mean_kernel, "m" * masked or "-", {"MASK": masked, "ROWS": ROWS})
    yield Spec(
        kernel=combine_kernel,
        case="",
        types=TYPES,
        constants={"ADDED": ADDED},
        divisible=True,
        options=COMBINE_OPTIONS,
    )


COMPILE = tuple(_specs())
