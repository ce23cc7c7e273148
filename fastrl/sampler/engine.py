"""The rollout engine: sequences are admitted as pages allow, prefilled, and decoded together in windows of steps.

    while engine.window(): ...

The host decides who comes in and how many rows a step has, from a few numbers that it reads once per window: on CUDA those of the
window before, so that it never waits for the device.  Rows that have ended are compacted away, and their pages given back, when
that leaves a smaller step or room for others.  Randomness is keyed by (seed, sequence, position): a sample does not depend on the
batch, the order or the process it was drawn in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import UserError
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prefill import PREFILL_TOKENS, Span, fill
from fastrl.sampler.queue import Entry, Group, Queue, Waiting
from fastrl.sampler.state import CANCELLED, Look, State, pages_of
from fastrl.sampler.step import Filters, Step, bucket, runner

PAGE = 64  # tokens a cache page holds
MAX_ROWS = {"cpu": 256, "cuda": 1024}  # decoded together
WINDOW = {"cpu": 1, "cuda": 16}  # decode steps between two looks
COMPACT_BELOW = {"cpu": 0.95, "cuda": 0.8}  # share of live rows below which the others are compacted away
ADMIT_AT_ONCE = 1 / 16  # of the rows: so many come in together, unless nothing else is left to do


class Engine:
    """Decodes sequences of one model.  Buffers, cache and graphs stay from call to call.

    tokens   cache budget, in pages of `page`; `max_rows` sequences are decoded at a time, `prefill_tokens` tokens prefilled
    """

    def __init__(
        self, model: Any, *, tokens: int, page: int = PAGE, max_rows: int | None = None, prefill_tokens: int | None = None,
        window: int | None = None,
    ) -> None:  # fmt: skip
        kind = model.device.type
        self.model, self.tokens, self.page = model, tokens, page
        self.max_rows = max_rows or MAX_ROWS.get(kind, 256)
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(kind, 4096)
        self.steps, self.compact_below = window or WINDOW.get(kind, 1), COMPACT_BELOW.get(kind, 0.95)
        self.cache: PagedCache | None = None
        self.state: State | None = None
        self.weights: tuple[int, ...] = ()
        self.peak_pages = 0
        self.timing: dict[str, float] = {}

    # --- a call ---
    def begin(
        self, S: int, C: int, pages: int, *, seed: int, temperature: float, filters: Filters, stops: Sequence[int], version: int,
        between: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Make ready for up to S sequences of up to C tokens that together may need `pages`; `between` is called before each window.

        Raises UserError when the weights are not where captured graphs would read them.
        """
        self._check_weights()
        self._make_room(S, C, pages, len(stops))
        self.state.begin(seed, temperature, stops, version)
        self.filters, self.queue, self.looks = filters, Queue(self.page), deque()
        self.between, self.late = between, between is None and self.model.device.type == "cuda"
        self.n = self.peak_pages = 0
        self.timing = dict.fromkeys(("prefill", "decode", "sample", "schedule"), 0.0)
        self.step.seconds = dict.fromkeys(self.step.seconds, 0.0)
        self.seen = Look(0, self.cache.capacity, 0, 0)

    def add(self, waiting: Sequence[Waiting]) -> None:
        """Queue sequences whose records are written."""
        for who in waiting:
            if pages_of(who.until, self.page) > self.cache.capacity:
                need = pages_of(who.until, self.page) * self.page
                raise UserError(
                    f"max_tokens_in_flight: sequence {who.seq} alone may need {need} tokens of cache, above the budget of {self.tokens}"
                )
        for who in waiting:
            self.queue.add(who)

    def cancel(self, seqs: Sequence[int]) -> None:
        """End these sequences where they are."""
        gone = self.queue.remove(set(seqs))
        for who in gone:
            if who.group.waiting == 0 and who.group.table is not None:
                self.cache.release(who.group.table[None])
                who.group.table = None
        state = self.state
        ids = torch.tensor([w.seq for w in gone], dtype=torch.int64, device=state.device)
        state.records.finish.index_fill_(0, ids, CANCELLED)
        asked = torch.tensor(list(seqs), dtype=torch.int64, device=state.device)
        state.end(self.n, torch.isin(state.rows.seq[: self.n], asked), CANCELLED)

    def window(self) -> bool:
        """Admit whom there is room for, decode one window, and say whether anything is left to do."""
        began, before = time.perf_counter(), sum(self.timing.values())
        if self.between is not None and self.n:
            self.between()
        self._settle()
        self._admit()
        if self.n:
            b = min(bucket(self.n, self.state.device), self.state.B)
            self._post()
            decode_began = time.perf_counter()
            for _ in range(self.steps):
                self.run(b, self.filters)
            self._time_steps(time.perf_counter() - decode_began)
        self.timing["schedule"] += time.perf_counter() - began - (sum(self.timing.values()) - before)
        return self.n > 0 or len(self.queue) > 0

    def fresh(self) -> Look:
        """What holds now.  Waits for the device."""
        return Look(*self.state.look(self.n).tolist())

    def drawn(self, *, wait: bool) -> int:
        """Tokens drawn in this call; without waiting for the device, those that the last look saw."""
        return int(self.state.total) if wait or not self.late else self.seen.total

    def unfinished(self) -> int:
        """Sequences that are not done, as far as the last look saw."""
        return len(self.queue) + self.seen.alive

    def end(self, reason: int) -> None:
        """End all rows where they are, for this reason."""
        self.state.end(self.n, self.state.rows.alive[: self.n].clone(), reason)

    def finish(self) -> None:
        """Give the pages of all rows back.  Waits for the device."""
        if self.n:
            self.peak_pages = max(self.peak_pages, self.fresh().used)
            self.state.compact(self.n)
            self.n = 0

    # --- inside a window ---
    def _settle(self) -> None:
        """See how many rows are left, and compact the others away when it pays."""
        if self.n == 0:
            self.looks.clear()
            return
        if not self.late:
            self.seen = self.fresh()
        elif self.looks:
            numbers, event = self.looks.popleft()
            event.synchronize()
            self.seen = Look(*numbers.tolist())
        self.peak_pages = max(self.peak_pages, self.seen.used)
        dead = self.n - self.seen.alive
        wanted = len(self.queue) > 0 and dead >= self._at_once()
        if dead and (wanted or self.seen.alive == 0 or self.seen.alive < self.compact_below * self.n):
            self.state.compact(self.n)
            self.n = self.seen.alive
            if not self.late:
                self.seen = self.fresh()  # with the pages that were given back

    def _admit(self) -> None:
        free = self.max_rows - self.n
        if not len(self.queue) or (self.n and free < self._at_once()):
            return
        entries = self.queue.admit(free, self.seen.room if self.n else self.cache.spare(), idle=self.n == 0)
        if entries:
            began = time.perf_counter()
            self._enter(entries)
            self.timing["prefill"] += time.perf_counter() - began

    def _at_once(self) -> int:
        return min(len(self.queue), max(1, int(ADMIT_AT_ONCE * self.max_rows)))

    def _post(self) -> None:
        """Send what a later `_settle` will look at on its way."""
        if self.late:
            numbers = self.state.look(self.n).to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.looks.append((numbers, event))

    def _time_steps(self, seconds: float) -> None:
        """On CPU a step's parts are measured; on CUDA the host only sees what it enqueues."""
        if not self.late:
            for part in ("decode", "sample"):
                self.timing[part] += self.step.seconds[part]
                self.step.seconds[part] = 0.0
        else:
            self.timing["decode"] += seconds

    def _enter(self, entries: Sequence[Entry]) -> None:
        """Give the entries rows n, n+1, ...: pages, prompts prefilled, keys of what follows them, and their state."""
        state, cache = self.state, self.cache
        groups = list({id(e.who.group): e.who.group for e in entries}.values())
        tables, opened = self._open(groups)
        place = {id(g): i for i, g in enumerate(groups)}
        member = torch.tensor([place[id(e.who.group)] for e in entries], device=state.device)
        rows = self._rows(entries, tables[member])
        for i, g in enumerate(groups):
            taken = g.waiting == 0 or any(e.takes for e in entries if e.who.group is g)
            g.table = None if taken else tables[i]
        if self.model.supports_cache:
            fill(self.model, cache, tables, [Span(i, g.prompt, 0, len(g.prompt) - 1) for i, g in opened], self.prefill_tokens)
            self._copy_partial(entries, tables[member], rows)
            longer = [(i, e.who) for i, e in enumerate(entries) if e.who.length > len(e.who.group.prompt)]
            spans = [Span(i, state.records.tokens[w.seq], len(w.group.prompt) - 1, w.length - 1) for i, w in longer]
            fill(self.model, cache, rows, spans, self.prefill_tokens)
        self._place(entries, rows)

    def _open(self, groups: Sequence[Group]) -> tuple[Tensor, list[tuple[int, Group]]]:
        """Tables (g, N) of the groups, those that were not open with pages for their prompt; which ones these are."""
        width = self.state.rows.table.shape[1]
        opened = [(i, g) for i, g in enumerate(groups) if g.table is None]
        counts = [g.full(self.page) + 1 for _, g in opened]
        tables = torch.zeros(len(groups), width, dtype=torch.int32, device=self.state.device)
        for i, g in enumerate(groups):
            if g.table is not None:
                tables[i] = g.table
        self.give(tables, [i for i, _ in opened], [0] * len(opened), counts)
        return tables, opened

    def give(self, tables: Tensor, rows: Sequence[int], first: Sequence[int], counts: Sequence[int]) -> None:
        """New pages for these rows of `tables`: `counts` of them, from column `first` on."""
        total = sum(counts)
        if total:
            where = [(r, a + j) for r, a, n in zip(rows, first, counts, strict=True) for j in range(n)]
            row, column = torch.tensor(where, device=tables.device).T
            tables[row, column] = self.cache.take(total)

    def _rows(self, entries: Sequence[Entry], theirs: Tensor) -> Tensor:
        """Tables (m, N) of the entries: the full pages of their groups', and pages of their own up to their newest token."""
        full = [e.who.group.full(self.page) for e in entries]
        kept = [f + e.takes for f, e in zip(full, entries, strict=True)]
        column = torch.arange(theirs.shape[1], device=theirs.device)
        mine = torch.where(column < torch.tensor(kept, device=theirs.device)[:, None], theirs, 0)
        takes = torch.tensor([e.takes for e in entries], device=theirs.device)
        self.cache.share(torch.where(takes[:, None], 0, mine).flatten())
        self.give(mine, range(len(entries)), kept, [(e.who.length - 1) // self.page + 1 - k for e, k in zip(entries, kept, strict=True)])
        return mine

    def _copy_partial(self, entries: Sequence[Entry], theirs: Tensor, mine: Tensor) -> None:
        """Copy what lies in the page after a prompt's full ones to every sample that does not take that page over."""
        where = [
            (i, p)
            for i, e in enumerate(entries)
            if not e.takes
            for p in range(e.who.group.full(self.page) * self.page, len(e.who.group.prompt) - 1)
        ]
        if where:
            row, position = torch.tensor(where, device=mine.device).T
            self.cache.copy(self.cache.slots(theirs, row, position), self.cache.slots(mine, row, position))

    def _place(self, entries: Sequence[Entry], tables: Tensor) -> None:
        state, at = self.state, slice(self.n, self.n + len(entries))
        numbers = [(w.seq, w.length, w.drawn, w.budget, w.until) for w in (e.who for e in entries)]
        seq, length, drawn, budget, until = torch.tensor(numbers, device=state.device).T
        last = state.records.tokens[seq, length - 1]
        for x, value in zip(state.rows, (seq, length, drawn, budget, until, last, True, tables), strict=True):
            x[at] = value
        self.n += len(entries)
        self.seen = replace(self.seen, alive=self.n)

    # --- buffers ---
    def _make_room(self, S: int, C: int, pages: int, stops: int) -> None:
        """Buffers, cache and step that are large enough: those there are, or new ones."""
        pages = min(self.tokens // self.page, pages)
        grow = self.cache is None or self.cache.capacity < pages
        if grow:
            self.cache = None  # the old one's memory goes first
            self.cache = PagedCache(self.model, pages, self.page)
        if grow or self.state is None or not self.state.fits(S, C, stops):
            old = (self.state.S, self.state.C) if self.state is not None else (0, 0)
            self.state = State(self.cache, self.max_rows, max(S, old[0]), max(C, old[1]), self.model.device)
            if stops > self.state.stops.numel():
                self.state.stops = torch.full((stops,), -1, dtype=torch.int64, device=self.model.device)
            self.step = Step(self.model, self.state)
            self.run = runner(self.step, self.model.device)

    def release(self) -> None:
        """Give the cache's memory, and the graphs that read it, back; the next call makes them anew."""
        self.cache = self.state = None
        self.weights = ()

    def _check_weights(self) -> None:
        """The optimizer must write where the graphs read."""
        places = tuple(p.data_ptr() for p in self.model.parameters())
        if self.weights and places != self.weights:
            names = [n for n, _ in self.model.named_parameters()]
            moved = next(n for n, a, b in zip(names, self.weights, places, strict=False) if a != b)
            raise UserError(f"model: {moved} has moved since the last rollout; write weights in place, or call Sampler.release() first")
        self.weights = places
