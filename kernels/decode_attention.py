"""Attention of one new token per sequence over its paged key/value cache.

    y_b = softmax_j(scale q_b . k_bj) v_b,  j < lengths_b,   k_bj = k_cache[block_table[b, j // page], j % page]

H query heads share K key/value heads.  A sequence of length 0 (a free slot of the batch) gets zeros.  No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels._backend import pick, register, route
from fastrl.kernels._check import FLOATS, INTS, compute_dtype, dims, same_device


# --- reference --------------------------------------------------------------------------------------
def reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """The definition, over a copy of the pages in use: up to the longest sequence on CPU, all of the table on CUDA.

    Cache rows past a sequence's length are read (and weighted 0): they must be finite, so a cache starts as zeros.
    """
    (B, H, E), (_, page, K, _), dtype = q.shape, k_cache.shape, compute_dtype(q)
    longest = block_table.shape[1] * page
    if lengths.device.type == "cpu":  # free to read here; on CUDA it would wait for the device
        longest = int(lengths.max()) if B else 0
    if longest == 0:
        return torch.zeros_like(q)
    table = block_table[:, : -(-longest // page)].clamp(0, k_cache.shape[0] - 1).flatten()  # unused entries may hold anything
    k, v = (c.index_select(0, table).view(B, -1, K, E)[:, :longest].to(dtype) for c in (k_cache, v_cache))
    beyond = (torch.arange(longest, device=q.device) >= lengths[:, None])[:, None]
    y = torch.empty(B, K, H // K, E, dtype=dtype, device=q.device)
    for h, query in enumerate(q.to(dtype).view(B, K, H // K, E).unbind(1)):  # a head at a time: strided GEMMs, no transposed copy
        s = torch.bmm(query, k[:, :, h].transpose(1, 2)).mul_(scale).masked_fill_(beyond, -torch.inf)
        m = s.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)  # finite for an empty sequence
        s.sub_(m).exp_()
        total = s.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        y[:, h] = torch.bmm(s, v[:, :, h]).div_(total)
    return y.view(B, H, E).to(q.dtype)


register("decode_attention", "reference", forward=reference)


# --- registration -----------------------------------------------------------------------------------
@torch.library.custom_op("fastrl::decode_attention", mutates_args=())
def forward_op(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """y (B, H, E)."""
    return pick("decode_attention", q, "forward")(q, k_cache, v_cache, block_table, lengths, scale)


@forward_op.register_fake
def _(q, k_cache, v_cache, block_table, lengths, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


# --- public -----------------------------------------------------------------------------------------
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of each sequence's newest token over its cache, in which that token's key and value are already stored.

    Shapes:  q (B, H, E) bf16|fp16|fp32|fp64;  k_cache, v_cache (pages, page, K, E) of q's dtype, K divides H;
             block_table (B, N) int32: the page of each `page` tokens;  lengths (B,) int32, at most N page  ->  (B, H, E).
    Memory:  the reference copies the pages in use.  Not differentiable.
    Raises:  ValueError or TypeError naming the argument (lengths are read on CPU only).
    Source:  Kwon et al. 2023, "PagedAttention".
    """
    B, H, E = dims("q", q, "B H E", FLOATS)
    pages, page, K, _ = dims("k_cache", k_cache, "pages page K E", (q.dtype,), E=E)
    dims("v_cache", v_cache, "pages page K E", (q.dtype,), pages=pages, page=page, K=K, E=E)
    _, N = dims("block_table", block_table, "B N", INTS, B=B)
    dims("lengths", lengths, "B", INTS, B=B)
    if K == 0 or H % K:
        raise ValueError(f"k_cache: expected key/value heads K that divide H={H} query heads, got K={K}")
    same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, lengths=lengths)
    readable = B and lengths.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere this would wait or break a graph
    if readable and int(lengths.max()) > N * page:
        raise ValueError(f"lengths: expected at most {N * page} tokens ({N} pages of {page}), got {int(lengths.max())}")
    run = route(forward_op, "decode_attention", "forward", q, k_cache, v_cache, block_table, lengths)
    return run(q, k_cache, v_cache, block_table, lengths, E**-0.5 if scale is None else float(scale))
