"""The paged key/value cache: one slab, an allocator that lives on the device, and the attentions that go
through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._native.decoder_layer import Paged
from fastrl.kernels.advance import Pages

# layer, q (T, H, E), k (T, K, E), v (T, K, E) -> (T, H, E)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PagedCache:
    """Keys and values in pages of `page` tokens, and which pages are free.

    A sequence's token at position p lies in page `table[p // page]` of its row of a block table, at offset p
    % page.  Page 0 is nobody's: tables are padded with it, and rows that have ended write there.  Pages may
    be shared; `pages.refs` counts users (-1 for a free page).  Every method but `spare` only enqueues work on
    the device.
    """

    def __init__(self, model: Any, pages: int, page: int) -> None:
        config, device = model.config, model.device
        layers, heads, width = (
            (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
            if model.supports_cache
            else (0, 1, 1)
        )
        shape = (layers, pages + 1, page, heads, width)
        # zeros: unused slots of a page must be finite
        self.k = torch.zeros(shape, dtype=model.dtype, device=device)
        self.v = torch.zeros(shape, dtype=model.dtype, device=device)
        self.paged = list(zip(self.k, self.v, strict=True))  # by layer, (pages, page, K, E)
        self.flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in self.paged]  # (slots, K, E)
        self.page, self.capacity = page, pages
        free, refs = (torch.zeros(pages + 1, dtype=torch.int32, device=device) for _ in range(2))
        self.pages = Pages(free, torch.zeros(1, dtype=torch.int64, device=device), refs)
        self.reset()

    def reset(self) -> None:
        """Take every page back, whoever has it."""
        free, top, refs = self.pages
        free.copy_(torch.arange(self.capacity, -1, -1))  # page 1 is on top; page 0 lies past the stack's end
        top.fill_(self.capacity)
        refs.fill_(-1)
        refs[0] = 1

    @staticmethod
    def token_bytes(model: Any) -> int:
        """Bytes of keys and values a token takes."""
        config = model.config
        if not model.supports_cache:
            return 1
        return (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        )

    def spare(self) -> int:
        """Free pages.  Waits for the device."""
        return int(self.pages.top)

    def take(self, n: int) -> Tensor:
        """n free pages (n,) int32, with one user each.  The caller knows that there are as many."""
        free, top, refs = self.pages
        taken = free[top - 1 - torch.arange(n, device=free.device)]
        refs.index_fill_(0, taken.long(), 1)
        top.sub_(n)
        return taken

    def share(self, taken: Tensor) -> None:
        """One more user for each of these pages; page 0 is left out."""
        self._count(taken, 1)

    def release(self, tables: Tensor) -> None:
        """One user less for each page of these tables (n, N); the last user's pages become free."""
        free, top, refs = self.pages
        self._count(tables.flatten(), -1)
        freed = refs == 0
        rank = freed.cumsum(0)
        place = torch.where(freed, top + rank - 1, self.capacity)  # past the stack, where nobody looks
        free.index_copy_(0, place, torch.arange(self.capacity + 1, dtype=torch.int32, device=free.device))
        refs.sub_(freed.int())
        top.add_(rank[-1])

    def _count(self, taken: Tensor, by: int) -> None:
        self.pages.refs.index_add_(0, taken.long(), torch.where(taken > 0, by, 0).to(torch.int32))

    # --- slots and what goes through them ---
    def slots(self, table: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Flat slab slot of each (row of the table, position) pair, int64."""
        return table[row, position // self.page].long() * self.page + position % self.page

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values of all layers from slots to slots."""
        for slab in (self.k, self.v):
            flat = slab.flatten(1, 2)
            flat.index_copy_(1, target, flat.index_select(1, source))

    def prefill(self, cu_seqlens: Tensor, max_seqlen: int, slots: Tensor) -> Attend:
        """Packed causal attention of whole prompts, or of their beginnings, that also stores every token's
        key and value.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen)

        return Through(self, slots, attend)

    def append(self, slots: Tensor, table: Tensor, row: Tensor, lengths: Tensor) -> Attend:
        """Attention of tokens that follow others already stored: token i sees the first lengths[i] tokens of
        table row row[i].

        Each reads the pages for itself, as in decoding: the bits are those of a prompt that came in one
        piece.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.decode_attention(q, self.k[layer], self.v[layer], table, lengths, rows=row)

        return Through(self, slots, attend)

    def follow(
        self, cu_seqlens: Tensor, slots: Tensor, past: Tensor, cu_past: Tensor, longest: int
    ) -> Attend:
        """The same through the packed attention of prompts: `past` (T_k,) are the slots of every sequence's
        tokens up to its last new one, ended by cu_past (S+1,), the longest of so many tokens.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (slab[layer].flatten(0, 1).index_select(0, past) for slab in (self.k, self.v))
            return ops.attention(q, keys, values, cu_seqlens, cu_seqlens_k=cu_past, max_seqlen=longest)

        return Through(self, slots, attend)

    def decode(self, slots: Tensor, table: Tensor, lengths: Tensor) -> Attend:
        """Attention of one new token per row over that row's pages."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.decode_attention(q, self.k[layer], self.v[layer], table, lengths)

        return Decoding(self, slots, attend, table, lengths)


class Through:
    """An attention through the cache: rope writes each token's key and value to its slot, in its own launch,
    before this is called.
    """

    def __init__(self, cache: PagedCache, slots: Tensor, attend: Attend) -> None:
        self.cache, self.slots, self.attend = cache, slots, attend

    def slab(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat caches (slots, K, E) of keys and of values, and each token's slot."""
        return *self.cache.flat[layer], self.slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(layer, q, k, v)


class Decoding(Through):
    """The same of one new token per row, by names that a layer which runs in one call understands."""

    def __init__(
        self, cache: PagedCache, slots: Tensor, attend: Attend, table: Tensor, lengths: Tensor
    ) -> None:
        super().__init__(cache, slots, attend)
        self.table, self.lengths = table, lengths

    def paged(self, layer: int) -> Paged:
        """The layer's pages, where each new key and value goes, and what each row's query sees."""
        return Paged(*self.cache.paged[layer], self.slots, self.table, self.lengths)
