"""Keys and values of tokens that are there already: prompts, what follows them in carried-over sequences, observations.

Spans of several sequences are packed into one forward of up to so many tokens.  A longer span is cut into chunks; a chunk that has
tokens before it sees their keys through the block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.sampler.cache import PagedCache

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one forward


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a sequence of which `tokens` holds all from 0 on; its pages are row `row` of the block table."""

    row: int
    tokens: Tensor
    start: int
    end: int


def fill(model: Any, cache: PagedCache, table: Tensor, spans: Sequence[Span], budget: int) -> None:
    """Store the keys and values of the spans' tokens, those before each span being there."""
    for pack in packs(spans, budget):
        sizes = [s.end - s.start for s in pack]
        tokens = torch.cat([s.tokens[s.start : s.end] for s in pack])
        device = tokens.device
        row, start, size = torch.tensor([[s.row for s in pack], [s.start for s in pack], sizes], device=device)
        cu = torch.cat([size.new_zeros(1), size.cumsum(0)])
        row, first = (torch.repeat_interleave(x, size, output_size=len(tokens)) for x in (row, start - cu[:-1]))
        position = torch.arange(len(tokens), device=device) + first
        slots = cache.slots(table, row, position)
        if pack[0].start == 0:
            attend = cache.prefill(cu.to(torch.int32), max(sizes), slots)
        else:
            attend = cache.append(slots, table, row, (position + 1).to(torch.int32))
        model(tokens, cu.to(torch.int32), positions=position, attend=attend)


def packs(spans: Sequence[Span], budget: int) -> Iterator[list[Span]]:
    """The spans as chunks of at most `budget` tokens, packed up to it: first what begins a sequence, then what continues one."""
    chunks = [Span(s.row, s.tokens, a, min(a + budget, s.end)) for s in spans for a in range(s.start, s.end, budget)]
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
