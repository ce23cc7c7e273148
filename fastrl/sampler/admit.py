"""Start admitted sequences: allocate pages, prefill each prompt once, initialise decode rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.model.language import CachedModel, LanguageModel, has_cache
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prefill import Span, prefill, token_places
from fastrl.sampler.queue import Admission, RequestGroup
from fastrl.sampler.state import State


def start(
    model: LanguageModel, state: State, admissions: Sequence[Admission], first: int, budget: int
) -> None:
    """Give the admitted sequences rows first, first + 1, ... and fill their caches, at most `budget` tokens
    in one forward.
    """
    cache = state.cache
    groups = list({id(a.request.group): a.request.group for a in admissions}.values())
    place = {id(group): i for i, group in enumerate(groups)}
    tables, opened = _open(state, groups)
    group_of = torch.tensor([place[id(a.request.group)] for a in admissions], device=state.device)
    group_tables = tables[group_of]
    row_tables = _row_tables(cache, admissions, group_tables)

    inherited = {id(a.request.group) for a in admissions if a.inherits_pages}
    for i, group in enumerate(groups):
        group.table = None if id(group) in inherited else tables[i]

    if has_cache(model):
        prompts = [Span(i, group.prompt, 0, len(group.prompt) - 1) for i, group in opened]
        prefill(model, cache, tables, prompts, budget)
        _copy_partial(cache, admissions, group_tables, row_tables)
        _prefill_rest(model, state, admissions, row_tables, budget)
    _write_rows(state, admissions, row_tables, first)


def _open(state: State, groups: Sequence[RequestGroup]) -> tuple[Tensor, list[tuple[int, RequestGroup]]]:
    """Tables (g, N) of the groups, and which of these are new: they get pages for their prompt."""
    opened = [(i, group) for i, group in enumerate(groups) if group.table is None]
    tables = torch.zeros(len(groups), state.rows.table.shape[1], dtype=torch.int32, device=state.device)
    for i, group in enumerate(groups):
        if group.table is not None:
            tables[i] = group.table

    counts = [group.full_pages(state.cache.page) + 1 for _, group in opened]
    allocate(state.cache, tables, [i for i, _ in opened], [0] * len(opened), counts)
    return tables, opened


def allocate(
    cache: PagedCache, tables: Tensor, rows: Sequence[int], first: Sequence[int], counts: Sequence[int]
) -> None:
    """New pages for these rows of `tables`: `counts` of them, from column `first` on."""
    total = sum(counts)
    if not total:
        return
    cells = []
    for row, start_column, count in zip(rows, first, counts, strict=True):
        cells += [(row, start_column + j) for j in range(count)]
    row_index, column = torch.tensor(cells, device=tables.device).T
    tables[row_index, column] = cache.take(total)


def _row_tables(cache: PagedCache, admissions: Sequence[Admission], group_tables: Tensor) -> Tensor:
    """Tables (m, N) of the sequences: the full pages of their groups, and pages of their own up to their
    newest token.
    """
    page, device = cache.page, group_tables.device
    shared = [a.request.group.full_pages(page) + a.inherits_pages for a in admissions]
    column = torch.arange(group_tables.shape[1], device=device)
    is_shared = column < torch.tensor(shared, device=device)[:, None]
    tables = torch.where(is_shared, group_tables, 0)

    # who inherits a group's pages takes its place as a user
    inherits = torch.tensor([a.inherits_pages for a in admissions], device=device)
    cache.share(torch.where(inherits[:, None], 0, tables).flatten())

    needed = [(a.request.length - 1) // page + 1 for a in admissions]
    counts = [n - k for n, k in zip(needed, shared, strict=True)]
    allocate(cache, tables, range(len(admissions)), shared, counts)
    return tables


def _copy_partial(
    cache: PagedCache, admissions: Sequence[Admission], group_tables: Tensor, row_tables: Tensor
) -> None:
    """Copy the partly filled page after a prompt's full ones to every sample that does not inherit it."""
    page = cache.page
    spans = []
    for i, admission in enumerate(admissions):
        group = admission.request.group
        end = len(group.prompt) - 1
        if not admission.inherits_pages and end % page:
            spans.append((i, group.full_pages(page) * page, end))
    if not spans:
        return

    row, start_position, end_position = torch.tensor(spans, device=row_tables.device).T
    total = sum(end - begin for _, begin, end in spans)
    place, position = token_places(start_position, end_position, total)
    source = cache.slots(group_tables, row[place], position)
    cache.copy(source, cache.slots(row_tables, row[place], position))


def _prefill_rest(
    model: CachedModel, state: State, admissions: Sequence[Admission], row_tables: Tensor, budget: int
) -> None:
    """Keys and values of the tokens after the prompt, which sequences that were carried over have."""
    spans = []
    for i, admission in enumerate(admissions):
        request = admission.request
        prompt_length = len(request.group.prompt)
        if request.length > prompt_length:
            tokens = state.records.tokens[request.seq]
            spans.append(Span(i, tokens, prompt_length - 1, request.length - 1))
    prefill(model, state.cache, row_tables, spans, budget)


def _write_rows(state: State, admissions: Sequence[Admission], tables: Tensor, first: int) -> None:
    """The state of the new rows."""
    requests = [a.request for a in admissions]
    numbers = [(r.seq, r.length, r.drawn, r.budget, r.max_length) for r in requests]
    seq, length, drawn, budget, max_length = torch.tensor(numbers, device=state.device).T
    last = state.records.tokens[seq, length - 1]
    values = (seq, length, drawn, budget, max_length, last, True, tables)
    end = first + len(admissions)
    for column, value in zip(state.rows, values, strict=True):
        column[first:end] = value
