"""The paged key/value cache, and the two attentions that go through it: a packed one that fills it, a paged one that reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl import ops

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (T, H, E), k (T, K, E), v (T, K, E) -> (T, H, E)


class PagedCache:
    """Keys and values of B rows, in pages of `page` tokens from one slab per layer.

    Row b's token at position p lives in page `block_table[b, p // page]`, at offset p % page.  Every row owns the pages for the
    `row_tokens[b]` tokens it may need; its table is padded with page 0, which it never reads.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, *, row_tokens: list[int], page: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        pages = torch.tensor([-(-n // page) for n in row_tokens], device=device)
        shape = (layers, sum(-(-n // page) for n in row_tokens), page, kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # zeros: unused slots of a page must be finite
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.page = page
        column = torch.arange(max(-(-n // page) for n in row_tokens), device=device)
        own = column < pages[:, None]
        self.block_table = torch.where(own, (pages.cumsum(0) - pages)[:, None] + column, 0).to(torch.int32)

    def slots(self, row: Tensor, position: Tensor) -> Tensor:
        """Flat slab slot of each (row, position) pair, int64."""
        return self.block_table[row, position // self.page].long() * self.page + position % self.page

    def keep(self, rows: Tensor) -> None:
        """Forget every row but these, in this order; their pages stay where they are."""
        self.block_table = self.block_table[rows]

    def prefill(self, cu_seqlens: Tensor, max_seqlen: int, source: Tensor, slots: Tensor) -> Attend:
        """Packed causal attention that also stores token `source[i]`'s key and value at `slots[i]`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._store(layer, k[source], v[source], slots)
            return ops.attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen)

        return attend

    def decode(self, slots: Tensor, lengths: Tensor) -> Decode:
        """Attention of one new token per row over that row's pages; the token's own key and value go to its slot."""
        return Decode(self, slots, lengths)

    def _store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)


class Decode:
    """What `PagedCache.decode` returns: rope writes the keys and values to `slab` in its own launch."""

    def __init__(self, cache: PagedCache, slots: Tensor, lengths: Tensor) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def slab(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat caches (slots, K, E) of keys and of values, and each token's slot."""
        return self.cache.k[layer].flatten(0, 1), self.cache.v[layer].flatten(0, 1), self.slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.decode_attention(q, self.cache.k[layer], self.cache.v[layer], self.cache.block_table, self.lengths)
