"""Attention of new tokens over a longer past: queries are the last tokens of their sequence, keys and values
all of it.

    y_i = softmax_j(scale q_i . k_j) v_j,   j <= i + keys - queries

within a sequence: the causal mask, aligned with its last token.

There is a forward only, a sequence at a time: a prompt is continued in few large pieces.  Lengths are read on
the host, which waits for the device on CUDA; the kernels of flash.py do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrl.kernels._check import compute_dtype

SCORES_BYTES = 2 << 20  # one block of scores of the reference

Prefix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


def _sequences(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each sequence that has queries."""
    q, k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
        if a < b:
            yield slice(a, b), slice(c, d)


def _visible(first: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Which of `keys` each of `rows` queries sees, from token `first` of the sequence on."""
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril_(first)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    """The definition, by blocks of query rows: y (T, H, E)."""
    (_, H, E), K, dtype = q.shape, k.shape[1], compute_dtype(q)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for queries, sequence in _sequences(cu_seqlens, cu_seqlens_k):
        keys, values = (x[sequence].to(dtype).transpose(0, 1) for x in (k, v))  # (K, L, E)
        L = keys.shape[1]
        past = L - (queries.stop - queries.start)
        rows = max(16, SCORES_BYTES // (dtype.itemsize * H * L))
        for a in range(queries.start, queries.stop, rows):
            b = min(a + rows, queries.stop)
            query = q[a:b].to(dtype).view(b - a, K, H // K, E).permute(1, 2, 0, 3)  # (K, G, rows, E)
            hidden = ~_visible(past + a - queries.start, b - a, L, q.device)
            s = torch.matmul(query, keys[:, None].transpose(2, 3))
            s.mul_(scale).masked_fill_(hidden, -torch.inf)
            out = torch.matmul(s.softmax(-1), values[:, None])
            y[a:b] = out.permute(2, 0, 1, 3).reshape(b - a, H, E)
    return y


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float, max_seqlen: int
) -> Tensor:
    """PyTorch's own attention with a mask.

    Key heads are repeated for their query heads: with shared heads CUDA would form all scores.
    """
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    G = q.shape[1] // k.shape[1]
    for queries, sequence in _sequences(cu_seqlens, cu_seqlens_k):
        query = q[queries].transpose(0, 1)[None]
        keys, values = (x[sequence].transpose(0, 1).repeat_interleave(G, 0)[None] for x in (k, v))
        rows, L = query.shape[2], keys.shape[2]
        mask = _visible(L - rows, rows, L, q.device)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        y[queries] = out[0].transpose(0, 1)
    return y
