"""The paged key/value cache: one slab, an allocator that lives on the device, and the attentions that read
and write them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._layer import Paged, Scratch
from fastrl.kernels._rows import in_any_order, put_rows
from fastrl.kernels.advance import Pages
from fastrl.model.language import Attend, LanguageModel, has_cache


class PagedCache:
    """Keys and values in pages of `page` tokens, and which pages are free.

    A sequence's token at position p lies in page `table[p // page]` of its row of a block table, at offset p
    % page.  Page 0 is the pad page: tables are padded with it, and rows that have ended write there.  Pages
    may be shared; `pages.refs` counts users (-1 for a free page).  Every method but `spare` only enqueues
    work on the device.
    """

    def __init__(self, model: LanguageModel, pages: int, page: int) -> None:
        layers, heads, width = _shape(model)
        shape = (layers, pages + 1, page, heads, width)
        # zeros: unused slots of a page must be finite
        self.k = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.v = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.paged = list(zip(self.k, self.v, strict=True))  # by layer, (pages, page, K, E)
        self.flat = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in self.paged]  # (slots, K, E)
        self.page, self.capacity = page, pages

        free, refs = (torch.zeros(pages + 1, dtype=torch.int32, device=model.device) for _ in range(2))
        top = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.pages = Pages(free, top, refs)
        self.reset()

    def reset(self) -> None:
        """Free every page, used or not."""
        free, top, refs = self.pages
        # page 1 is on top; page 0 lies past the stack's end
        free.copy_(torch.arange(self.capacity, -1, -1, device=free.device))
        top.fill_(self.capacity)
        refs.fill_(-1)
        refs[:1].fill_(1)  # refs[0] = 1 would copy the number from the host

    @staticmethod
    def token_bytes(model: LanguageModel) -> int:
        """Bytes of keys and values a token takes; 1 for a model without a cache."""
        layers, heads, width = _shape(model)
        return 2 * layers * heads * width * model.dtype.itemsize if has_cache(model) else 1

    def spare(self) -> int:
        """Free pages.  Waits for the device."""
        return int(self.pages.top)

    def take(self, n: int) -> Tensor:
        """n free pages (n,) int32, with one user each.  The caller makes sure that so many are free."""
        free, top, refs = self.pages
        taken = free[top - 1 - torch.arange(n, device=free.device)]
        refs.index_fill_(0, taken.long(), 1)
        top.sub_(n)
        return taken

    def share(self, taken: Tensor) -> None:
        """One more user for each of these pages; page 0 is left out."""
        self._count(taken, 1)

    def release(self, tables: Tensor) -> None:
        """One user less for each page of these tables (n, N); a page without users becomes free."""
        free, top, refs = self.pages
        self._count(tables.flatten(), -1)
        freed = refs == 0
        rank = freed.cumsum(0)

        # pages that stay in use are written past the end of the stack, which is never read
        place = torch.where(freed, top + rank - 1, self.capacity)
        numbers = torch.arange(self.capacity + 1, dtype=torch.int32, device=free.device)
        put_rows(free, place, numbers)
        refs.sub_(freed.int())
        top.add_(rank[-1])

    def _count(self, taken: Tensor, by: int) -> None:
        change = torch.where(taken > 0, by, 0).to(torch.int32)
        with in_any_order(self.pages.refs):
            self.pages.refs.index_add_(0, taken.long(), change)

    # --- slots and the attentions over them ---
    def slots(self, table: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Flat slab slot of each (row of the table, position) pair, int64."""
        page = table[row, position // self.page].long()
        return page * self.page + position % self.page

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values of all layers from slots to slots."""
        for slab in (self.k, self.v):
            flat = slab.flatten(1, 2)
            with in_any_order(flat):
                flat.index_copy_(1, target, flat.index_select(1, source))

    def prefill(self, cu_seqlens: Tensor, max_seqlen: int, slots: Tensor) -> Attend:
        """Packed causal attention of whole prompts, or of their beginnings, that also stores every token's
        key and value.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen)

        return CachedAttention(self, slots, attend)

    def extend_exactly(self, slots: Tensor, table: Tensor, row: Tensor, lengths: Tensor) -> Attend:
        """Attention of tokens that follow stored ones: token i sees the first lengths[i] tokens of table row
        row[i].

        Each token reads the pages on its own, as in decoding: the bits are those of a prompt prefilled in one
        piece.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.decode_attention(q, self.k[layer], self.v[layer], table, lengths, rows=row)

        return CachedAttention(self, slots, attend)

    def extend(
        self, cu_seqlens: Tensor, slots: Tensor, past: Tensor, cu_past: Tensor, longest: int
    ) -> Attend:
        """Attention of tokens that follow stored ones, through the packed attention of prompts.

        `past` (T_k,) are the slots of every sequence's tokens up to its last new one, cu_past (S+1,) the ends
        of the sequences among them, `longest` the tokens of the longest.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = (slab[layer].flatten(0, 1).index_select(0, past) for slab in (self.k, self.v))
            return ops.attention(q, keys, values, cu_seqlens, cu_seqlens_k=cu_past, max_seqlen=longest)

        return CachedAttention(self, slots, attend)

    def decode(self, slots: Tensor, table: Tensor, lengths: Tensor) -> Attend:
        """Attention of one new token per row over that row's pages."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.decode_attention(q, self.k[layer], self.v[layer], table, lengths)

        return DecodeAttention(self, slots, attend, table, lengths)


def _shape(model: LanguageModel) -> tuple[int, int, int]:
    """Layers, key/value heads and their width; no layers for a model without a cache."""
    if not has_cache(model):
        return 0, 1, 1
    config = model.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


class CachedAttention:
    """An attention over the cache: rope writes each token's key and value to its slot, in its own launch,
    before this is called.
    """

    def __init__(self, cache: PagedCache, slots: Tensor, attend: Attend) -> None:
        self.cache, self.slots, self.attend = cache, slots, attend

    def slab(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Flat caches (slots, K, E) of keys and of values, and each token's slot."""
        return *self.cache.flat[layer], self.slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(layer, q, k, v)


class DecodeAttention(CachedAttention):
    """The attention of one new token per row, with the pages that a layer needs to run in one call."""

    def __init__(
        self, cache: PagedCache, slots: Tensor, attend: Attend, table: Tensor, lengths: Tensor
    ) -> None:
        super().__init__(cache, slots, attend)
        self.table, self.lengths, self.scratch = table, lengths, Scratch()

    def paged(self, layer: int) -> Paged:
        """The layer's pages, where each new key and value goes, and what each row's query sees."""
        return Paged(*self.cache.paged[layer], self.slots, self.table, self.lengths, self.scratch)
