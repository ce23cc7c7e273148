"""Keys and values of known tokens: prompts, what follows them in carried-over sequences, observations.

Spans of several sequences are packed into one forward of up to a budget of tokens.  A longer span is cut into
chunks; a chunk with tokens before it sees their keys through the block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.kernels._backend import is_exact
from fastrl.model.language import Attend, CachedModel
from fastrl.sampler.cache import PagedCache

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one forward


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a sequence; `tokens` holds it from position 0 on, and its pages are row `row` of
    the block table.
    """

    row: int
    tokens: Tensor
    start: int
    end: int


def prefill(model: CachedModel, cache: PagedCache, table: Tensor, spans: Sequence[Span], budget: int) -> None:
    """Store the keys and values of the spans' tokens; those before each span are stored already."""
    for pack in packs(spans, budget):
        tokens = torch.cat([s.tokens[s.start : s.end] for s in pack])
        numbers = [(s.row, s.start, s.end) for s in pack]
        row, start, end = torch.tensor(numbers, device=tokens.device).T
        cu_seqlens = _ends(end - start)
        place, position = token_places(start, end, len(tokens))
        attend = _attention(cache, table, pack, row, end, cu_seqlens, row[place], position)
        model(tokens, cu_seqlens, positions=position, attend=attend, only_store=True)


def _attention(
    cache: PagedCache,
    table: Tensor,
    pack: Sequence[Span],
    row: Tensor,
    end: Tensor,
    cu_seqlens: Tensor,
    token_row: Tensor,
    position: Tensor,
) -> Attend:
    """The pack's attention.

    Packed where it begins sequences.  Where it continues them, packed too, over the keys read back from their
    pages; or, in exact mode, from page to page, as in decoding.
    """
    slots = cache.slots(table, token_row, position)
    longest = max(s.end for s in pack)
    if pack[0].start == 0:
        return cache.prefill(cu_seqlens, longest, slots)
    if is_exact():
        return cache.extend_exactly(slots, table, token_row, (position + 1).to(torch.int32))

    place, past_position = token_places(torch.zeros_like(end), end, sum(s.end for s in pack))
    past = cache.slots(table, row[place], past_position)
    return cache.extend(cu_seqlens, slots, past, _ends(end), longest)


def token_places(start: Tensor, end: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of the `total` tokens of spans [start, end): the span it belongs to and its position, both
    (total,).
    """
    spans = torch.arange(len(end), device=end.device)
    place = torch.repeat_interleave(spans, end - start, output_size=total)
    first = start - _ends(end - start)[:-1]
    return place, torch.arange(total, device=end.device) + first[place]


def _ends(size: Tensor) -> Tensor:
    return torch.cat([size.new_zeros(1), size.cumsum(0)]).to(torch.int32)


def packs(spans: Sequence[Span], budget: int) -> Iterator[list[Span]]:
    """The spans as chunks of at most `budget` tokens, packed up to it: first those that begin a sequence,
    then those that continue one.
    """
    chunks = []
    for s in spans:
        for start in range(s.start, s.end, budget):
            chunks.append(Span(s.row, s.tokens, start, min(start + budget, s.end)))

    for continues in (False, True):
        pack: list[Span] = []
        packed = 0
        for chunk in chunks:
            if (chunk.start > 0) != continues:
                continue
            size = chunk.end - chunk.start
            if packed + size > budget:
                yield pack
                pack, packed = [], 0
            pack.append(chunk)
            packed += size
        if pack:
            yield pack
