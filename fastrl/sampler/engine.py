"""The rollout engine: sequences are admitted as pages allow, prefilled, and decoded together in windows of
steps.

    while engine.window(): ...

The host decides who comes in and how many rows a step has, from a few numbers that it reads once per window:
on CUDA those of the window before, so that it never waits for the device.  Rows that have ended are compacted
away, and their pages given back, when that leaves a smaller step or room for others.  Randomness is keyed by
(seed, sequence, position): a sample does not depend on the batch, the order or the process it was drawn in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastrl.errors import UserError
from fastrl.kernels._launch import on_device
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.enter import enter
from fastrl.sampler.prefill import PREFILL_TOKENS
from fastrl.sampler.queue import Queue, Waiting
from fastrl.sampler.state import CANCELLED, Look, State, pages_of
from fastrl.sampler.step import Filters, Step, bucket, runner

PAGE = 64  # tokens a cache page holds
MAX_ROWS = {"cpu": 256, "cuda": 1024}  # decoded together
WINDOW = {"cpu": 1, "cuda": 16}  # decode steps between two looks
LATE = {"cuda": True}  # whether a look shows what was one window before, so that the host never waits
COMPACT_BELOW = {"cpu": 0.95, "cuda": 0.8}  # share of live rows below which the others are compacted away
ADMIT_AT_ONCE = 1 / 16  # of the rows: so many come in together, unless nothing else is left to do


class Engine:
    """Decodes sequences of one model.  Buffers, cache and graphs stay from call to call.

    tokens   cache budget, in pages of `page`; `max_rows` sequences are decoded at a time, `prefill_tokens`
             tokens prefilled
    """

    weights: tuple[int, ...]  # where captured graphs read them; empty while there are none
    looks: deque[tuple[torch.Tensor, torch.cuda.Event]]  # on their way to the host
    between: Callable[[], None] | None

    def __init__(
        self,
        model: Any,
        *,
        tokens: int,
        page: int = PAGE,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        window: int | None = None,
    ) -> None:
        kind = model.device.type
        self.model, self.tokens, self.page = model, tokens, page
        self.max_rows = max_rows or MAX_ROWS.get(kind, 256)
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(kind, 4096)
        self.steps, self.compact_below = window or WINDOW.get(kind, 1), COMPACT_BELOW.get(kind, 0.95)
        self.peak_pages, self.timing = 0, dict[str, float]()
        self.release()

    # --- a call ---
    def begin(
        self,
        S: int,
        C: int,
        pages: int,
        *,
        seed: int,
        temperature: float,
        filters: Filters,
        stops: Sequence[int],
        version: int,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Make ready for up to S sequences of up to C tokens that together may need `pages`; `between` is
        called before each window.

        Raises UserError when the weights are not where captured graphs would read them.
        """
        places = self._check_weights()
        self._make_room(S, C, pages, len(stops))
        self.weights = places
        self.state.begin(seed, temperature, stops, version)
        self.filters, self.queue, self.looks = filters, Queue(self.page), deque()
        self.between, self.late = between, between is None and LATE.get(self.model.device.type, False)
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
                    f"max_tokens_in_flight: sequence {who.seq} alone may need {need} tokens of "
                    f"cache, above the budget of {self.tokens}"
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

    @torch.no_grad()
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
        """End all rows where they are, for this reason; turns that have ended are answered before."""
        if self.between is not None and self.n:
            self.between()
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
            enter(self.model, self.state, entries, self.n, self.prefill_tokens)
            self.n += len(entries)
            self.seen = replace(self.seen, alive=self.n)
            self.timing["prefill"] += time.perf_counter() - began

    def _at_once(self) -> int:
        return min(len(self.queue), max(1, int(ADMIT_AT_ONCE * self.max_rows)))

    def _post(self) -> None:
        """Send what a later `_settle` will look at on its way."""
        if self.late:
            numbers = self.state.look(self.n).to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            with on_device(self.state.total):
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

    # --- buffers ---
    def release(self) -> None:
        """Give the memory of cache and records, and the graphs that read it, back; the next call makes them
        anew.
        """
        self.weights, self.looks, self.between = (), deque(), None
        self.queue = Queue(self.page)  # who waits has a view of the records
        self._build(0, 0, 0, 0, 0)

    def _build(self, pages: int, B: int, S: int, C: int, stops: int) -> None:
        """Cache, buffers, and the step over them: whatever held those before holds these, so that nothing
        keeps the old.
        """
        self.cache = PagedCache(self.model, pages, self.page)
        self.state = State(self.cache, B, S, C, self.model.device, stops)
        self.step = Step(self.model, self.state)
        self.run = runner(self.step, self.model.device)

    def _make_room(self, S: int, C: int, pages: int, stops: int) -> None:
        """Buffers, cache and step that are large enough: those there are, or new ones."""
        pages = min(self.tokens // self.page, pages)
        if pages <= self.cache.capacity <= self.tokens // self.page and self.state.fits(S, C, stops):
            self.cache.reset()
            return
        S, C, stops = max(S, self.state.S), max(C, self.state.C), max(stops, self.state.stops.numel())
        pages = min(max(pages, self.cache.capacity), self.tokens // self.page)
        self.release()  # the old cache's memory goes first
        self._build(pages, self.max_rows, S, C, stops)

    def _check_weights(self) -> tuple[int, ...]:
        """Where the weights are: where captured graphs read them, which the optimizer must have written."""
        places = tuple(p.data_ptr() for p in self.model.parameters())
        if self.weights and places != self.weights:
            names = [n for n, _ in self.model.named_parameters()]
            moved = next(n for n, a, b in zip(names, self.weights, places, strict=False) if a != b)
            raise UserError(
                f"model: {moved} has moved since the last rollout; write weights in place, "
                "or call Sampler.release() first"
            )
        return places
