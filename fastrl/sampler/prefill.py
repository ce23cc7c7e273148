"""Keys and values of known tokens: prompts, what follows them in carried-over sequences, observations.

Spans of several sequences are packed into one forward of up to a budget of tokens.  A longer span is cut into
chunks; a chunk with tokens before it sees their keys through the block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.kernels._backend import is_exact
from fastrl.model.language import Attend, CachedModel
from fastrl.sampler.cache import PagedCache

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one forward


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of record `seq`; the sequence's pages are row `row` of the block table."""

    row: int
    seq: int
    start: int
    end: int


Pack = list[Span]


def numbers(pack: Pack) -> Tensor:
    """(4, S) int64 on the host: row, sequence, start and end of each span."""
    return torch.tensor([(s.row, s.seq, s.start, s.end) for s in pack], dtype=torch.int64).T.contiguous()


def prefill(
    model: CachedModel,
    cache: PagedCache,
    table: Tensor,
    tokens: Tensor,
    packed: Sequence[Pack],
    sent: Sequence[Tensor],
) -> None:
    """Store the keys and values of the packs' tokens; those before each span are stored already.

    tokens  (S, C) of all sequences
    sent    the `numbers` of each pack, on the device
    """
    for pack, (row, seq, start, end) in zip(packed, sent, strict=True):
        total = sum(s.end - s.start for s in pack)
        place, position = token_places(start, end, total)
        cu_seqlens = _ends(end - start)
        attend = _attention(cache, table, pack, row, end, cu_seqlens, row[place], position)
        model(tokens[seq[place], position], cu_seqlens, positions=position, attend=attend, only_store=True)


def _attention(
    cache: PagedCache,
    table: Tensor,
    pack: Pack,
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


def packs(spans: Sequence[Span], budget: int) -> list[Pack]:
    """The spans as chunks of at most `budget` tokens, packed up to it: first those that begin a sequence,
    then those that continue one.
    """
    chunks = []
    for s in spans:
        for start in range(s.start, s.end, budget):
            chunks.append(Span(s.row, s.seq, start, min(start + budget, s.end)))

    found: list[Pack] = []
    for continues in (False, True):
        pack: Pack = []
        packed = 0
        for chunk in chunks:
            if (chunk.start > 0) != continues:
                continue
            size = chunk.end - chunk.start
            if packed + size > budget:
                found.append(pack)
                pack, packed = [], 0
            pack.append(chunk)
            packed += size
        if pack:
            found.append(pack)
    return found
