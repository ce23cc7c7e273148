"""Start admitted sequences: allocate pages, prefill each prompt once, initialise decode rows.

Which pages, rows and tokens that takes is counted on the host (`Plan`) and sent to the device by one copy,
for which nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.batch.transfer import send
from fastrl.kernels._rows import put_rows
from fastrl.model.language import LanguageModel, has_cache
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prefill import Pack, Span, numbers, packs, prefill, token_places
from fastrl.sampler.queue import Admission, RequestGroup
from fastrl.sampler.state import State


@dataclass(frozen=True, slots=True)
class Plan:
    """What an admission of m sequences of g groups does, on the host.

    groups       the groups
    group        (m,) each sequence's group
    prompt_pages (2, .) cells (row, column) of the groups' tables (g, N) that get a new page
    shared       (m,) how many pages a sequence takes from its group
    inherits     (m,) 1 where it takes the group's place as their user
    own_pages    (2, .) cells of the sequences' tables (m, N) that get a new page
    partial      (3, .) row and positions [start, end) of what is copied from the group's partly filled page,
                 `copied` tokens in all
    rows         (5, m) sequence, length, tokens drawn, budget and greatest length
    prompts      packs of prompts, whose rows are those of the groups' tables
    rest         packs of what follows prompts, whose rows are those of the sequences' tables
    """

    groups: list[RequestGroup]
    group: Tensor
    prompt_pages: Tensor
    shared: Tensor
    inherits: Tensor
    own_pages: Tensor
    partial: Tensor
    copied: int
    rows: Tensor
    prompts: list[Pack]
    rest: list[Pack]

    def tensors(self) -> list[Tensor]:
        """All that the device needs of it, in the order of the fields; `numbers` for each pack."""
        own = (self.prompt_pages, self.shared, self.inherits, self.own_pages, self.partial, self.rows)
        return [self.group, *own, *map(numbers, self.prompts), *map(numbers, self.rest)]


def start(
    model: LanguageModel, state: State, admissions: Sequence[Admission], first: int, budget: int
) -> None:
    """Give the admitted sequences rows first, first + 1, ... and fill their caches, at most `budget` tokens
    in one forward.
    """
    cache = state.cache
    plan = _plan(admissions, cache.page, budget, cached=has_cache(model))
    sent = send(plan.tensors(), state.device)
    group, prompt_pages, shared, inherits, own_pages, partial, rows, *of_packs = sent

    tables = _group_tables(state, plan.groups)
    allocate(cache, tables, prompt_pages)
    group_tables = tables[group]
    row_tables = _row_tables(cache, group_tables, shared, inherits)
    allocate(cache, row_tables, own_pages)

    inherited = {id(a.request.group) for a in admissions if a.inherits_pages}
    for i, one in enumerate(plan.groups):
        one.table = None if id(one) in inherited else tables[i]

    if has_cache(model):
        tokens, n = state.records.tokens, len(plan.prompts)
        prefill(model, cache, tables, tokens, plan.prompts, of_packs[:n])
        _copy_partial(cache, group_tables, row_tables, partial, plan.copied)
        prefill(model, cache, row_tables, tokens, plan.rest, of_packs[n:])
    _write_rows(state, rows, row_tables, first)


# --- on the host ------------------------------------------------------------------------------------
def _plan(admissions: Sequence[Admission], page: int, budget: int, *, cached: bool) -> Plan:
    requests = [a.request for a in admissions]
    first_of = {id(r.group): r for r in reversed(requests)}  # a sequence that has the prompt
    groups = list({id(r.group): r.group for r in requests}.values())
    place = {id(group): i for i, group in enumerate(groups)}
    opened = [i for i, group in enumerate(groups) if group.table is None]
    pages = [groups[i].full_pages(page) + 1 for i in opened]
    prompt_pages = cells(opened, [0] * len(opened), pages)

    shared = [a.request.group.full_pages(page) + a.inherits_pages for a in admissions]
    needed = [(r.length - 1) // page + 1 for r in requests]
    own = [n - k for n, k in zip(needed, shared, strict=True)]
    own_pages = cells(range(len(admissions)), shared, own)

    partial = _partial(admissions, page)
    copied = sum(end - begin for _, begin, end in partial)
    partial_pages = _columns(partial, 3)
    rows = _columns([(r.seq, r.length, r.drawn, r.budget, r.max_length) for r in requests], 5)

    prompts: list[Span] = []
    for i in opened:
        group = groups[i]
        prompts.append(Span(i, first_of[id(group)].seq, 0, len(group.prompt) - 1))
    prompt_packs = packs(prompts, budget) if cached else []
    rest_packs = packs(_rest(admissions), budget) if cached else []

    group_of = torch.tensor([place[id(r.group)] for r in requests])
    inherits = torch.tensor([int(a.inherits_pages) for a in admissions])
    shared_pages = torch.tensor(shared)
    return Plan(
        groups=groups,
        group=group_of,
        prompt_pages=prompt_pages,
        shared=shared_pages,
        inherits=inherits,
        own_pages=own_pages,
        partial=partial_pages,
        copied=copied,
        rows=rows,
        prompts=prompt_packs,
        rest=rest_packs,
    )


def cells(rows: Sequence[int], first: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(2, .) the cells (row, column) of a table: `counts` of them in each of these rows, from column `first`
    on.
    """
    found = []
    for row, start_column, count in zip(rows, first, counts, strict=True):
        found += [(row, start_column + j) for j in range(count)]
    return _columns(found, 2)


def _columns(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, width).T.contiguous()


def _partial(admissions: Sequence[Admission], page: int) -> list[tuple[int, int, int]]:
    """Who copies the partly filled page after a prompt's full ones: every sample that does not inherit it."""
    spans = []
    for i, admission in enumerate(admissions):
        group = admission.request.group
        end = len(group.prompt) - 1
        if not admission.inherits_pages and end % page:
            spans.append((i, group.full_pages(page) * page, end))
    return spans


def _rest(admissions: Sequence[Admission]) -> list[Span]:
    """The tokens after the prompt, which sequences that were carried over have."""
    spans = []
    for i, admission in enumerate(admissions):
        request = admission.request
        prompt_length = len(request.group.prompt)
        if request.length > prompt_length:
            spans.append(Span(i, request.seq, prompt_length - 1, request.length - 1))
    return spans


# --- on the device ----------------------------------------------------------------------------------
def _group_tables(state: State, groups: Sequence[RequestGroup]) -> Tensor:
    """Tables (g, N) of the groups; zeros for those that are new."""
    tables = torch.zeros(len(groups), state.rows.table.shape[1], dtype=torch.int32, device=state.device)
    for i, group in enumerate(groups):
        if group.table is not None:
            tables[i] = group.table
    return tables


def allocate(cache: PagedCache, tables: Tensor, places: Tensor) -> None:
    """New pages for these `cells` of `tables`, which are all different."""
    total = places.shape[1]
    if total:
        row, column = places
        put_rows(tables.view(-1), row * tables.shape[1] + column, cache.take(total))


def _row_tables(cache: PagedCache, group_tables: Tensor, shared: Tensor, inherits: Tensor) -> Tensor:
    """Tables (m, N) of the sequences: the pages that they take from their groups."""
    column = torch.arange(group_tables.shape[1], device=group_tables.device)
    tables = torch.where(column < shared[:, None], group_tables, 0)

    # who inherits a group's pages takes its place as a user
    cache.share(torch.where(inherits[:, None] > 0, 0, tables).flatten())
    return tables


def _copy_partial(
    cache: PagedCache, group_tables: Tensor, row_tables: Tensor, spans: Tensor, total: int
) -> None:
    """Copy `total` keys and values of groups' partly filled pages to the sequences' own."""
    if not total:
        return
    row, start_position, end_position = spans
    place, position = token_places(start_position, end_position, total)
    source = cache.slots(group_tables, row[place], position)
    cache.copy(source, cache.slots(row_tables, row[place], position))


def _write_rows(state: State, numbers: Tensor, tables: Tensor, first: int) -> None:
    """The state of the new rows."""
    seq, length, drawn, budget, max_length = numbers
    last = state.records.tokens[seq, length - 1]
    values = (seq, length, drawn, budget, max_length, last, True, tables)
    end = first + len(seq)
    for column, value in zip(state.rows, values, strict=True):
        column[first:end] = value
