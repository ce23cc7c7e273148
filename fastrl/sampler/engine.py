"""The rollout engine: sequences are admitted as pages allow, prefilled, and decoded together in windows of
steps.

    while engine.window(): ...

The host decides which sequences start and how many rows a step has, from a few counters that it reads once
per window: on CUDA those of the window before, so that it never waits for the device.  Rows that have ended
are compacted away, and their pages freed, when that leaves a smaller step or room for others.  Randomness is
keyed by (seed, sequence, position): a sample does not depend on the batch, the order or the process it was
drawn in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.batch.transfer import send
from fastrl.errors import UserError
from fastrl.kernels._launch import on_device
from fastrl.kernels._verdicts.first_use import ensure
from fastrl.model.language import LanguageModel
from fastrl.model.widths import kernel_widths
from fastrl.sampler import admit
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prefill import PREFILL_TOKENS
from fastrl.sampler.queue import Queue, Request
from fastrl.sampler.state import CANCELLED, Snapshot, State, pages_of
from fastrl.sampler.step import DecodeStep, Filters, bucket, runner

PAGE = 64  # tokens a cache page holds
MAX_ROWS = {"cpu": 256, "cuda": 1024}  # decoded together
WINDOW = {"cpu": 1, "cuda": 16}  # decode steps between two snapshots
PIPELINED = {"cuda": True}  # whether the host acts on the snapshot of one window before, and never waits
COMPACT_BELOW = {"cpu": 0.95, "cuda": 0.8}  # share of live rows below which the others are compacted away
ADMIT_AT_ONCE = 1 / 16  # of the rows: this many start together, unless fewer wait


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSettings:
    """What one call samples with: keys of the noise, filters, stop tokens, and the version of the weights."""

    seed: int
    temperature: float
    filters: Filters
    stops: Sequence[int]
    version: int


class Engine:
    """Decodes sequences of one model.  Buffers, cache and graphs stay from call to call.

    tokens          cache budget, in pages of `page`
    max_rows        sequences decoded together
    prefill_tokens  tokens of one prefill
    window          decode steps between two snapshots
    logits_dtype    of the logits that tokens are drawn from, or wider where the model is
    """

    weights: tuple[int, ...]  # where captured graphs read them; empty while there are none
    snapshots: deque[tuple[Tensor, torch.cuda.Event]]  # on their way to the host
    before_window: Callable[[], None] | None

    def __init__(
        self,
        model: LanguageModel,
        *,
        tokens: int,
        page: int = PAGE,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        window: int | None = None,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        kind = model.device.type
        self.model, self.tokens, self.page = model, tokens, page
        self.max_rows = max_rows or MAX_ROWS.get(kind, 256)
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(kind, 4096)
        self.steps = window or WINDOW.get(kind, 1)
        self.logits_dtype = logits_dtype
        self.compact_below = COMPACT_BELOW.get(kind, 0.95)
        self.peak_pages, self.timing = 0, dict[str, float]()
        ensure(model.device, kernel_widths(model.config, page), (torch.float32, model.dtype))
        self.release()

    # --- a call ---
    def begin(
        self,
        S: int,
        C: int,
        pages: int,
        settings: CallSettings,
        before_window: Callable[[], None] | None = None,
    ) -> None:
        """Make ready for up to S sequences of up to C tokens that together may need `pages`; `before_window`
        is called before each window.

        Raises:  UserError when the weights are not where captured graphs would read them.
        """
        places = self._check_weights()
        self._make_room(S, C, pages, len(settings.stops))
        self.weights = places
        self.state.begin(settings.seed, settings.temperature, settings.stops, settings.version)
        self.filters, self.queue, self.snapshots = settings.filters, Queue(self.page), deque()
        self.before_window = before_window
        self.pipelined = before_window is None and PIPELINED.get(self.model.device.type, False)

        self.n = self.peak_pages = 0
        self.timing = dict.fromkeys(("prefill", "decode", "sample", "schedule"), 0.0)
        self.step.seconds = dict.fromkeys(self.step.seconds, 0.0)
        self.latest = Snapshot(0, self.cache.capacity, 0, 0)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue sequences with written records."""
        for request in requests:
            pages = pages_of(request.max_length, self.page)
            if pages > self.cache.capacity:
                raise UserError(
                    f"max_tokens_in_flight: sequence {request.seq} alone may need {pages * self.page} tokens "
                    f"of cache, above the budget of {self.tokens}"
                )
        for request in requests:
            self.queue.add(request)

    def cancel(self, seqs: Sequence[int]) -> None:
        """End these sequences where they are."""
        removed = self.queue.remove(set(seqs))
        for request in removed:
            group = request.group
            if group.waiting == 0 and group.table is not None:
                self.cache.release(group.table[None])
                group.table = None

        state = self.state
        waiting = [request.seq for request in removed]
        host = [torch.tensor(numbers, dtype=torch.int64) for numbers in (waiting, list(seqs))]
        ids, cancelled = send(host, state.device)
        state.records.finish.index_fill_(0, ids, CANCELLED)
        state.end(self.n, torch.isin(state.rows.seq[: self.n], cancelled), CANCELLED)

    @torch.no_grad()
    def window(self) -> bool:
        """Admit the sequences that fit, decode one window, and return whether anything is left to do."""
        began, timed = time.perf_counter(), sum(self.timing.values())
        if self.before_window is not None and self.n:
            self.before_window()
        self._reap()
        self._admit()
        if self.n:
            self._decode()

        elsewhere = sum(self.timing.values()) - timed
        self.timing["schedule"] += time.perf_counter() - began - elsewhere
        return self.n > 0 or len(self.queue) > 0

    def snapshot(self) -> Snapshot:
        """The counters as they are now.  Waits for the device."""
        return Snapshot(*self.state.look(self.n).tolist())

    def drawn(self, *, wait: bool) -> int:
        """Tokens drawn in this call; without waiting for the device, those of the latest snapshot."""
        return int(self.state.total) if wait or not self.pipelined else self.latest.drawn

    def unfinished(self) -> int:
        """Sequences that are not done, by the latest snapshot."""
        return len(self.queue) + self.latest.live

    def end(self, reason: int) -> None:
        """End all rows where they are, for this reason; turns that have ended are answered before."""
        if self.before_window is not None and self.n:
            self.before_window()
        self.state.end(self.n, self.state.rows.alive[: self.n].clone(), reason)

    def finish(self) -> None:
        """Free the pages of all rows.  Waits for the device."""
        if self.n:
            self.peak_pages = max(self.peak_pages, self.snapshot().used_pages)
            self.state.compact(self.n)
            self.n = 0

    # --- inside a window ---
    def _reap(self) -> None:
        """Find out how many rows are live, and compact the others away when it pays."""
        if self.n == 0:
            self.snapshots.clear()
            return

        if not self.pipelined:
            self.latest = self.snapshot()
        elif self.snapshots:
            numbers, event = self.snapshots.popleft()
            event.synchronize()
            self.latest = Snapshot(*numbers.tolist())
        self.peak_pages = max(self.peak_pages, self.latest.used_pages)

        live = self.latest.live
        dead = self.n - live
        wanted = len(self.queue) > 0 and dead >= self._at_once()
        if dead and (wanted or live == 0 or live < self.compact_below * self.n):
            self.state.compact(self.n)
            self.n = live
            if not self.pipelined:
                self.latest = self.snapshot()  # with the pages that were freed

    def _admit(self) -> None:
        """Start the sequences that there are rows and pages for."""
        free_rows = self.max_rows - self.n
        if not len(self.queue) or (self.n and free_rows < self._at_once()):
            return
        free_pages = self.latest.free_pages if self.n else self.cache.capacity - self.queue.held()
        admissions = self.queue.admit(free_rows, free_pages, idle=self.n == 0)
        if admissions:
            began = time.perf_counter()
            admit.start(self.model, self.state, admissions, self.n, self.prefill_tokens)
            self.n += len(admissions)
            self.latest = replace(self.latest, live=self.n)
            self.timing["prefill"] += time.perf_counter() - began

    def _at_once(self) -> int:
        return min(len(self.queue), max(1, int(ADMIT_AT_ONCE * self.max_rows)))

    def _decode(self) -> None:
        """The window's steps, after a snapshot of where they start."""
        b = min(bucket(self.n, self.state.device), self.state.B)
        self._enqueue_snapshot()
        began = time.perf_counter()
        for _ in range(self.steps):
            self.run(b, self.filters)
        self._time_steps(time.perf_counter() - began)

    def _enqueue_snapshot(self) -> None:
        """Send the counters that a later `_reap` reads on their way."""
        if self.pipelined:
            numbers = self.state.look(self.n).to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            with on_device(self.state.total):
                event.record()
            self.snapshots.append((numbers, event))

    def _time_steps(self, seconds: float) -> None:
        """On CPU a step's parts are measured; on CUDA the host only sees what it enqueues."""
        if self.pipelined:
            self.timing["decode"] += seconds
            return
        for part in ("decode", "sample"):
            self.timing[part] += self.step.seconds[part]
            self.step.seconds[part] = 0.0

    # --- buffers ---
    def release(self) -> None:
        """Free the memory of cache and records, and the graphs that read it; the next call makes new ones."""
        self.weights, self.snapshots, self.before_window = (), deque(), None
        self.queue = Queue(self.page)  # requests hold views of the records
        self._build(0, 0, 0, 0, 0)

    def _build(self, pages: int, B: int, S: int, C: int, stops: int) -> None:
        """Cache, buffers, and the step over them.  Every reference to older ones is replaced, so that their
        memory is freed.
        """
        self.cache = PagedCache(self.model, pages, self.page)
        self.state = State(self.cache, B, S, C, self.model.device, stops)
        self.step = DecodeStep(self.model, self.state, self.logits_dtype)
        self.run = runner(self.step, self.model.device)

    def _make_room(self, S: int, C: int, pages: int, stops: int) -> None:
        """Buffers, cache and step that are large enough: the present ones, or new ones."""
        budget = self.tokens // self.page
        pages = min(budget, pages)
        if pages <= self.cache.capacity <= budget and self.state.fits(S, C, stops):
            self.cache.reset()
            return
        S, C, stops = max(S, self.state.S), max(C, self.state.C), max(stops, self.state.stops.numel())
        pages = min(max(pages, self.cache.capacity), budget)
        self.release()  # the old cache's memory is freed first
        self._build(pages, self.max_rows, S, C, stops)

    def _check_weights(self) -> tuple[int, ...]:
        """Where the weights are.  Captured graphs read them there, so they must not have moved."""
        places = tuple(p.data_ptr() for p in self.model.parameters())
        if self.weights and places != self.weights:
            names = [name for name, _ in self.model.named_parameters()]
            moved = next(n for n, a, b in zip(names, self.weights, places, strict=False) if a != b)
            raise UserError(
                f"model: {moved} has moved since the last rollout; write weights in place, "
                "or call Sampler.release() first"
            )
        return places
