"""Keys and values of tokens that are there already: prompts, what follows them in carried-over sequences,
observations.

Spans of several sequences are packed into one forward of up to so many tokens.  A longer span is cut into
chunks; a chunk that has tokens before it sees their keys through the block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._backend import is_exact
from fastrl.sampler.cache import Attend, PagedCache

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one forward


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a sequence of which `tokens` holds all from 0 on; its pages are row `row` of the
    block table.
    """

    row: int
    tokens: Tensor
    start: int
    end: int


def fill(model: Any, cache: PagedCache, table: Tensor, spans: Sequence[Span], budget: int) -> None:
    """Store the keys and values of the spans' tokens, those before each span being there."""
    for pack in packs(spans, budget):
        tokens = torch.cat([s.tokens[s.start : s.end] for s in pack])
        row, start, end = torch.tensor([(s.row, s.start, s.end) for s in pack], device=tokens.device).T
        cu = _ends(end - start)
        place, position = places(start, end, len(tokens))
        attend = _attention(cache, table, pack, row, end, cu, row[place], position)
        model(tokens, cu, positions=position, attend=attend, only_store=True)


def _attention(
    cache: PagedCache,
    table: Tensor,
    pack: Sequence[Span],
    row: Tensor,
    end: Tensor,
    cu: Tensor,
    of: Tensor,
    position: Tensor,
) -> Attend:
    """The pack's attention: packed where it begins sequences; where it continues them, packed too, over the
    keys read back from their pages, or in exact mode from page to page, as in decoding.
    """
    slots, longest = cache.slots(table, of, position), max(s.end for s in pack)
    if pack[0].start == 0:
        return cache.prefill(cu, longest, slots)
    if is_exact():
        return cache.append(slots, table, of, (position + 1).to(torch.int32))
    place, all_positions = places(torch.zeros_like(end), end, sum(s.end for s in pack))
    return cache.follow(cu, slots, cache.slots(table, row[place], all_positions), _ends(end), longest)


def places(start: Tensor, end: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of spans [start, end): which one each of their `total` tokens belongs to, and its position, both
    (total,).
    """
    place = torch.repeat_interleave(torch.arange(len(end), device=end.device), end - start, output_size=total)
    first = start - _ends(end - start)[:-1]
    return place, torch.arange(total, device=end.device) + first[place]


def _ends(size: Tensor) -> Tensor:
    return torch.cat([size.new_zeros(1), size.cumsum(0)]).to(torch.int32)


def packs(spans: Sequence[Span], budget: int) -> Iterator[list[Span]]:
    """The spans as chunks of at most `budget` tokens, packed up to it: first what begins a sequence, then
    what continues one.
    """
    chunks = [
        Span(s.row, s.tokens, a, min(a + budget, s.end)) for s in spans for a in range(s.start, s.end, budget)
    ]
    for continues in (False, True):
        pack: list[Span] = []
        held = 0
        for chunk in (c for c in chunks if (c.start > 0) == continues):
            size = chunk.end - chunk.start
            if held + size > budget:
                yield pack
                pack, held = [], 0
            pack.append(chunk)
            held += size
        if pack:
            yield pack
