"""Sequences come in: pages, prompts prefilled once for all their samples, keys of what follows a prompt, and
the rows' state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prefill import Span, fill, places
from fastrl.sampler.queue import Entry, Group
from fastrl.sampler.state import State


def enter(model: Any, state: State, entries: Sequence[Entry], first: int, budget: int) -> None:
    """Give the entries rows first, first + 1, ... and fill their caches, at most `budget` tokens in one
    forward.
    """
    cache = state.cache
    groups = list({id(e.who.group): e.who.group for e in entries}.values())
    place = {id(g): i for i, g in enumerate(groups)}
    tables, opened = _open(state, groups)
    theirs = tables[torch.tensor([place[id(e.who.group)] for e in entries], device=state.device)]
    rows = _rows(cache, entries, theirs)
    taken = {id(e.who.group) for e in entries if e.takes}
    for i, g in enumerate(groups):
        g.table = None if id(g) in taken else tables[i]
    if model.supports_cache:
        fill(model, cache, tables, [Span(i, g.prompt, 0, len(g.prompt) - 1) for i, g in opened], budget)
        _copy_partial(cache, entries, theirs, rows)
        longer = [(i, e.who) for i, e in enumerate(entries) if e.who.length > len(e.who.group.prompt)]
        spans = [
            Span(i, state.records.tokens[w.seq], len(w.group.prompt) - 1, w.length - 1) for i, w in longer
        ]
        fill(model, cache, rows, spans, budget)
    _place(state, entries, rows, first)


def _open(state: State, groups: Sequence[Group]) -> tuple[Tensor, list[tuple[int, Group]]]:
    """Tables (g, N) of the groups, those that were not open with pages for their prompt; which ones these
    are.
    """
    opened = [(i, g) for i, g in enumerate(groups) if g.table is None]
    tables = torch.zeros(len(groups), state.rows.table.shape[1], dtype=torch.int32, device=state.device)
    for i, g in enumerate(groups):
        if g.table is not None:
            tables[i] = g.table
    counts = [g.full(state.cache.page) + 1 for _, g in opened]
    give(state.cache, tables, [i for i, _ in opened], [0] * len(opened), counts)
    return tables, opened


def give(
    cache: PagedCache, tables: Tensor, rows: Sequence[int], first: Sequence[int], counts: Sequence[int]
) -> None:
    """New pages for these rows of `tables`: `counts` of them, from column `first` on."""
    total = sum(counts)
    if total:
        where = [(r, a + j) for r, a, n in zip(rows, first, counts, strict=True) for j in range(n)]
        row, column = torch.tensor(where, device=tables.device).T
        tables[row, column] = cache.take(total)


def _rows(cache: PagedCache, entries: Sequence[Entry], theirs: Tensor) -> Tensor:
    """Tables (m, N) of the entries: the full pages of their groups', and pages of their own up to their
    newest token.
    """
    page, device = cache.page, theirs.device
    kept = [e.who.group.full(page) + e.takes for e in entries]
    column = torch.arange(theirs.shape[1], device=device)
    mine = torch.where(column < torch.tensor(kept, device=device)[:, None], theirs, 0)
    takes = torch.tensor([e.takes for e in entries], device=device)
    cache.share(torch.where(takes[:, None], 0, mine).flatten())
    give(
        cache,
        mine,
        range(len(entries)),
        kept,
        [(e.who.length - 1) // page + 1 - k for e, k in zip(entries, kept, strict=True)],
    )
    return mine


def _copy_partial(cache: PagedCache, entries: Sequence[Entry], theirs: Tensor, mine: Tensor) -> None:
    """Copy what lies in the page after a prompt's full ones to every sample that does not take that page
    over.
    """
    page = cache.page
    spans = [
        (i, e.who.group.full(page) * page, len(e.who.group.prompt) - 1)
        for i, e in enumerate(entries)
        if not e.takes and (len(e.who.group.prompt) - 1) % page
    ]
    if spans:
        row, start, end = torch.tensor(spans, device=mine.device).T
        place, position = places(start, end, sum(b - a for _, a, b in spans))
        cache.copy(cache.slots(theirs, row[place], position), cache.slots(mine, row[place], position))


def _place(state: State, entries: Sequence[Entry], tables: Tensor, first: int) -> None:
    numbers = [(w.seq, w.length, w.drawn, w.budget, w.until) for w in (e.who for e in entries)]
    seq, length, drawn, budget, until = torch.tensor(numbers, device=state.device).T
    last = state.records.tokens[seq, length - 1]
    for x, value in zip(state.rows, (seq, length, drawn, budget, until, last, True, tables), strict=True):
        x[first : first + len(entries)] = value
