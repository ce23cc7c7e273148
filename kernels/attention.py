"""Causal attention of packed sequences: a token sees itself and the tokens before it in its own sequence.

    s_ij = scale q_i . k_j  for j <= i       lse_i = log sum_j exp s_ij       p_ij = exp(s_ij - lse_i)
    y_i = sum_j p_ij v_j

    ds_ij = p_ij (dy_i . v_j - dy_i . y_i)
    dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij dy_i

H query heads share K key/value heads, each by H / K neighbours.  The backward keeps y and lse, never p.

With a past (`cu_seqlens_k`) the queries are the last tokens of their sequence: query i sees the keys
j <= i + keys - queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._attention import exact as _attention_exact
from fastrl.kernels._attention import prefix as _attention_prefix
from fastrl.kernels._attention.flash import FLASH
from fastrl.kernels._attention.padded import PADDED, padded
from fastrl.kernels._backend import EXACT_ONLY, ladder, pick, register, route, unbuilt
from fastrl.kernels._check import FLOATS, compute_dtype, dims, ends, no_gradient, same_device
from fastrl.kernels._contexts import ignore_autocast, lowered, with_gradient, without_gradient
from fastrl.kernels._native import attention as native

# a block of scores of the reference: it stays in a core's own cache, 3x faster than 16 MiB at length 1024
SCORES_BYTES = 2 << 20


# --- reference --------------------------------------------------------------------------------------
def _sequences(H: int, dtype: torch.dtype) -> Callable[[int], int]:
    return lambda L: SCORES_BYTES // (dtype.itemsize * H * L * L)


def _rows(H: int, L: int, dtype: torch.dtype) -> int:
    """Query rows of one sequence with scores that fit the byte budget."""
    return min(L, max(16, SCORES_BYTES // (dtype.itemsize * H * L)))


def _scores(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    """Masked scores (n K, G rows, keys) of queries (n, K, G, rows, E) from token `first` of a sequence on."""
    n, K, G, rows, E = q.shape
    keys = first + rows
    mask = torch.full((rows, keys), -torch.inf, dtype=q.dtype, device=q.device).triu_(first + 1).repeat(G, 1)
    return torch.baddbmm(mask, q.reshape(n * K, G * rows, E), k[:, :keys].transpose(1, 2), alpha=scale)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """The definition, on padded batches, by blocks of query rows: y (T, H, E) and lse (T, H)."""
    (T, H, E), K, dtype = q.shape, k.shape[1], compute_dtype(q)
    y, lse = q.new_empty(T, H, E), q.new_empty(T, H, dtype=dtype)
    for batch in padded(cu_seqlens, _sequences(H, dtype)):
        n, L = batch.index.shape
        queries = batch.take(q, dtype).view(n, K, H // K, L, E)
        keys, values = (batch.take(x, dtype).reshape(n * K, L, E) for x in (k, v))
        out, norm = queries.new_empty(n, H, L, E), queries.new_empty(n, H, L)
        rows = _rows(H, L, dtype)
        for a in range(0, L, rows):
            b = min(a + rows, L)
            s = _scores(queries[..., a:b, :], keys, a, scale)
            m = s.amax(-1, keepdim=True)
            total = s.sub_(m).exp_().sum(-1, keepdim=True)
            out[:, :, a:b] = torch.bmm(s, values[:, :b]).div_(total).view(n, H, b - a, E)
            norm[:, :, a:b] = total.log_().add_(m).view(n, H, b - a)
        batch.put(y, out)
        batch.put(lse, norm)
    return y, lse


def reference_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from probabilities recomputed by blocks."""
    (_, H, E), K, dtype = q.shape, k.shape[1], lse.dtype
    delta = (dy.to(dtype) * y.to(dtype)).sum(-1)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for batch in padded(cu_seqlens, _sequences(H, dtype)):
        n, L = batch.index.shape
        shape = (n, K, H // K, L)
        queries, dout = (batch.take(x, dtype).reshape(*shape, E) for x in (q, dy))
        keys, values = (batch.take(x, dtype).reshape(n * K, L, E) for x in (k, v))
        norm, minus = batch.take_lse(lse).reshape(shape), batch.take(delta, dtype).reshape(shape)

        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        rows = _rows(H, L, dtype)
        for a in range(0, L, rows):
            b = min(a + rows, L)
            query, dblock = (x[..., a:b, :].reshape(n * K, -1, E) for x in (queries, dout))
            p = _scores(queries[..., a:b, :], keys, a, scale)
            p.sub_(norm[..., a:b].reshape(n * K, -1, 1)).exp_()
            dv[:, :b] += _over_rows(p, dblock, H // K)
            ds = torch.bmm(dblock, values[:, :b].transpose(1, 2))
            ds.sub_(minus[..., a:b].reshape(n * K, -1, 1)).mul_(p)
            dq[..., a:b, :] = torch.bmm(ds, keys[:, :b]).mul_(scale).view(*shape[:3], b - a, E)
            dk[:, :b] += _over_rows(ds, query, H // K).mul_(scale)
        for out, x in zip(grads, (dq, dk, dv), strict=True):
            batch.put(out, x.view(n, -1, L, E))
    return grads


def _over_rows(p: Tensor, x: Tensor, G: int) -> Tensor:
    """p^T x, (n K, keys, E).

    Each query head is reduced by itself first: their sum then rounds half as much as one long reduction.
    """
    n = p.shape[0] * G
    heads = torch.bmm(p.view(n, -1, p.shape[2]).transpose(1, 2), x.reshape(n, -1, x.shape[2]))
    return heads if G == 1 else heads.view(-1, G, *heads.shape[1:]).sum(1)


register(
    "attention",
    "reference",
    forward=reference,
    backward=reference_backward,
    prefix=_attention_prefix.reference,
)


# --- kernels ----------------------------------------------------------------------------------------
# The ladder: the libraries that are installed, best first, and on CPU our own kernel; for wider heads, or
# where fastrl._C was not built, torch's, which runs each padded batch.
register(
    "attention",
    "cpu",
    dtypes=native.DTYPES,
    missing=unbuilt("attention_forward_cpu"),
    obstacle=native.obstacle,
    forward=native.forward,
    backward=native.backward,
    prefix=native.prefix,
)
for _name, _rung in (FLASH | PADDED).items():
    register("attention", _name, **_rung)
register(
    "attention",
    "exact",
    note=EXACT_ONLY,
    devices=("cpu", "cuda"),
    exact=("cpu", "cuda"),
    forward=_attention_exact.forward,
    backward=_attention_exact.backward,
    prefix=_attention_exact.prefix,
)
ladder("attention", *FLASH, "cpu", *PADDED, "reference")


# --- registration and autograd ----------------------------------------------------------------------
@torch.library.custom_op("fastrl::attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y (T, H, E) and lse (T, H); max_seqlen 0 means unknown."""
    return pick("attention", q, "forward")(q, k, v, cu_seqlens, scale, max_seqlen)


@torch.library.custom_op("fastrl::attention_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    return pick("attention", q, "backward")(dy, q, k, v, y, lse, cu_seqlens, scale, max_seqlen)


@torch.library.custom_op("fastrl::attention_prefix", mutates_args=())
def prefix_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    """y (T, H, E) of the last tokens of each sequence; it has no gradient."""
    return pick("attention", q, "prefix")(q, k, v, cu_seqlens, cu_seqlens_k, scale, max_seqlen)


@prefix_op.register_fake
def _(q, k, v, cu_seqlens, cu_seqlens_k, scale, max_seqlen):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@forward_op.register_fake
def _(q, k, v, cu_seqlens, scale, max_seqlen):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q))


@backward_op.register_fake
def _(dy, q, k, v, y, lse, cu_seqlens, scale, max_seqlen):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.max_seqlen = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, y, lse, cu_seqlens)


def _autograd(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *differentiate(dy, *ctx.saved_tensors, ctx.scale, ctx.max_seqlen), None, None, None


differentiate = without_gradient(backward_op)
differentiable = with_gradient(forward_op, _autograd, _setup)
ignore_autocast("attention", "attention_backward", "attention_prefix")


# --- public -----------------------------------------------------------------------------------------
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Causal attention within each packed sequence, differentiable in q, k and v.

    With `cu_seqlens_k` the queries are new tokens at the ends of their sequences, as in the continuation of a
    prompt; this has no gradient.

    Shapes:  q (T, H, E), k and v (T, K, E) bf16|fp16|fp32|fp64, K divides H;  cu_seqlens (S+1,) int32, empty
             sequences allowed;  scale defaults to E^-1/2;  max_seqlen, if known, lets some kernels skip
             reading the lengths;  cu_seqlens_k (S+1,) int32: k and v (T_k, K, E) hold each sequence's past
             and its new tokens, and max_seqlen counts keys
             ->  (T, H, E).
    Memory:  y and lse are kept for the backward.  The CPU kernel copies the keys and values of a few
             sequences at a time, or of one.  The reference and PyTorch's kernels copy a padded batch of
             sequences at a time, and read cu_seqlens on the host, which waits for the device on CUDA.
    Raises:  ValueError or TypeError naming the argument.
    Source:  Dao 2023, "FlashAttention-2" (the backward from lse).
    """
    q, k, v = lowered(q, k, v)
    T, H, E = dims("q", q, "T H E", FLOATS)
    if cu_seqlens_k is None:
        _, K, _ = dims("k", k, "T K E", (q.dtype,), T=T, E=E)
        dims("v", v, "T K E", (q.dtype,), T=T, K=K, E=E)
    else:
        T_k, K, _ = dims("k", k, "T_k K E", (q.dtype,), E=E)
        dims("v", v, "T_k K E", (q.dtype,), T_k=T_k, K=K, E=E)
    if E == 0:
        raise ValueError(f"q: expected heads of some width, got shape {tuple(q.shape)}")
    if K == 0 or H % K:
        raise ValueError(f"k: expected key/value heads K that divide H={H} query heads, got K={K}")
    same_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    ends("cu_seqlens", cu_seqlens, T)
    scale = E**-0.5 if scale is None else float(scale)
    if cu_seqlens_k is None:
        run = route(differentiable, "attention", "forward", q, k, v, cu_seqlens)
        return run(q, k, v, cu_seqlens, scale, max_seqlen or 0)[0]
    _check_past(cu_seqlens, cu_seqlens_k, T_k)
    no_gradient("attention with cu_seqlens_k", q=q, k=k, v=v)
    return prefix_op(q, k, v, cu_seqlens, cu_seqlens_k, scale, max_seqlen or 0)


def _check_past(cu_seqlens: Tensor, cu_seqlens_k: Tensor, T_k: int) -> None:
    """Raise ValueError unless each sequence has at least as many keys as queries."""
    S = ends("cu_seqlens_k", cu_seqlens_k, T_k)
    if cu_seqlens.numel() != S + 1:
        raise ValueError(f"cu_seqlens_k: expected the ends of S={cu_seqlens.numel() - 1} sequences, got {S}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    short = cu_seqlens_k.diff() < cu_seqlens.diff()
    if bool(short.any()):
        at = int(short.nonzero()[0])
        queries, keys = int(cu_seqlens.diff()[at]), int(cu_seqlens_k.diff()[at])
        raise ValueError(
            f"cu_seqlens_k: expected at least the {queries} tokens of sequence {at}'s queries, "
            f"got {keys} keys"
        )
