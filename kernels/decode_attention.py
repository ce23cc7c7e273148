"""Attention of single query tokens over paged key/value caches.

    y_b = softmax_j(scale q_b . k_bj) v_b,  j < lengths_b
    k_bj = k_cache[block_table[rows_b, j // page], j % page]

H query heads share K key/value heads.  A query of length 0 (a free slot of the batch) gets zeros.  The op has
no gradient.

Decoding has one query per row of the table.  With `rows`, several tokens of one sequence attend over the same
pages, each with its own length: a prompt that is continued, or a whole sequence scored by the kernel that
sampled it.

The kernels take the keys in blocks that start at fixed positions, so that the bits of a query's output depend
on that query, its keys and its values only: not on the rest of the batch, nor on where the pages lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, register_triton, route, unbuilt
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, no_gradient, same_device
from fastrl.kernels._contexts import ignore_autocast
from fastrl.kernels._launch import FLOAT_CODES
from fastrl.kernels._native import decode_attention as native

COPIED_BYTES = 256 << 20  # of keys and values that the reference copies at a time


# --- reference --------------------------------------------------------------------------------------
def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition, over a copy of the pages: as many as the longest sequence has on CPU, all on CUDA."""
    (B, H, E), (_, page, K, _), N = q.shape, k_cache.shape, block_table.shape[1]
    longest = N * page
    if lengths.device.type == "cpu":  # reading them on CUDA would wait for the device
        least, longest = (int(lengths.min()), int(lengths.max())) if B else (0, 0)
        if least < 0 or longest > N * page:
            raise ValueError(_range(longest if least >= 0 else least, N, page))
    if longest == 0:
        return torch.zeros(B, H, E, dtype=q.dtype, device=q.device)
    # unused entries may hold anything
    table = block_table[:, : -(-longest // page)].clamp(0, k_cache.shape[0] - 1)
    table = table if rows is None else table.index_select(0, rows)
    each = max(1, COPIED_BYTES // (2 * longest * K * E * compute_dtype(q).itemsize))
    parts = zip(q.split(each), table.split(each), lengths.split(each), strict=True)
    return torch.cat([_dense(*part, k_cache, v_cache, longest, scale) for part in parts])


def _dense(
    q: Tensor, table: Tensor, lengths: Tensor, k_cache: Tensor, v_cache: Tensor, longest: int, scale: float
) -> Tensor:
    """One query for each row of `table`; what lies past a length may be NaN, and is masked."""
    (B, H, E), K, dtype = q.shape, k_cache.shape[2], compute_dtype(q)
    k, v = (
        c.index_select(0, table.flatten()).view(B, -1, K, E)[:, :longest].to(dtype)
        for c in (k_cache, v_cache)
    )
    beyond = torch.arange(longest, device=q.device) >= lengths[:, None]
    v.masked_fill_(beyond[:, :, None, None], 0)  # weighted 0, but 0 * nan is nan
    y = torch.empty(B, K, H // K, E, dtype=dtype, device=q.device)
    # a head at a time: strided GEMMs, no transposed copy
    for h, query in enumerate(q.to(dtype).view(B, K, H // K, E).unbind(1)):
        s = torch.bmm(query, k[:, :, h].transpose(1, 2)).mul_(scale).masked_fill_(beyond[:, None], -torch.inf)
        m = s.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)  # finite for an empty sequence
        s.sub_(m).exp_()
        total = s.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        y[:, h] = torch.bmm(s, v[:, :, h]).div_(total)
    return y.view(B, H, E).to(q.dtype)


def _range(got: int, N: int, page: int) -> str:
    limit = "at least 0 tokens" if got < 0 else f"at most {N * page} tokens ({N} pages of {page})"
    return f"lengths: expected {limit}, got {got}"


register("decode_attention", "reference", forward=reference)


# --- kernels ----------------------------------------------------------------------------------------
register(
    "decode_attention",
    "cpu",
    dtypes=tuple(FLOAT_CODES),
    missing=unbuilt("decode_attention_cpu"),
    exact=("cpu",),
    forward=native.forward,
)
register_triton("decode_attention", "decode_attention", "forward", exact=True)


# --- registration -----------------------------------------------------------------------------------
# defined by its schema: a call of a `custom_op` costs 17 us more on the host
torch.library.define(
    "fastrl::decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths, Tensor? rows, "
    "float scale) -> Tensor",
)
forward_op = torch.ops.fastrl.decode_attention.default


@torch.library.impl("fastrl::decode_attention", "default")
def _run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    return pick("decode_attention", q, "forward")(q, k_cache, v_cache, block_table, lengths, rows, scale)


@torch.library.register_fake("fastrl::decode_attention")
def _(q, k_cache, v_cache, block_table, lengths, rows, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


ignore_autocast("decode_attention")


# --- public -----------------------------------------------------------------------------------------
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of query tokens over the caches of their sequences, which hold their own keys and values too.

    Shapes:  q (B, H, E) bf16|fp16|fp32|fp64;  k_cache, v_cache (pages, page, K, E) of q's dtype, contiguous,
             K divides H;  block_table (R, N) int32: the page of each `page` tokens;  lengths (B,) int32, at
             most N page: the keys that a query sees, its own included;  rows (B,) int: the row of block_table
             that each query reads; None for R = B, query b reading row b
             ->  (B, H, E).
             Entries of block_table, and slots of a page, past a length may hold anything.
    Memory:  the kernels: on CUDA, (E + 2) fp32 numbers for each query head and split of its keys.  The
             reference copies the pages in use.  Not differentiable.
    Raises:  ValueError or TypeError naming the argument (lengths, rows and pages are read on CPU only).
    Source:  Kwon et al. 2023, "PagedAttention"; Dao et al. 2023, "Flash-Decoding".
    """
    B, H, E = dims("q", q, "B H E", FLOATS)
    pages, page, K, _ = dims("k_cache", k_cache, "pages page K E", (q.dtype,), E=E)
    dims("v_cache", v_cache, "pages page K E", (q.dtype,), pages=pages, page=page, K=K, E=E)
    dims("lengths", lengths, "B", INTS, B=B)
    if rows is None:
        dims("block_table", block_table, "B N", INTS, B=B)
    else:
        dims("block_table", block_table, "R N", INTS)
        dims("rows", rows, "B", INTS, B=B)
    if E == 0 or page == 0:
        raise ValueError(f"k_cache: expected pages of tokens and heads of some width, got page={page}, E={E}")
    if K == 0 or H % K:
        raise ValueError(f"k_cache: expected key/value heads K that divide H={H} query heads, got K={K}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous cache, got strides {cache.stride()}")
    same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lengths=lengths, rows=rows)
    no_gradient("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    run = route(forward_op, "decode_attention", "forward", q, k_cache, v_cache, block_table, lengths)
    return run(q, k_cache, v_cache, block_table, lengths, rows, E**-0.5 if scale is None else float(scale))
