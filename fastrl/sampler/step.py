"""One decode step of the first b rows, all on the device; and its CUDA graphs, one per bucket of rows."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl import ops
from fastrl.kernels._backend import asked
from fastrl.kernels._head import project
from fastrl.kernels._launch import on_device
from fastrl.kernels.advance import Newest, Rows, advance, newest
from fastrl.kernels.sample import Sample
from fastrl.model.language import LanguageModel
from fastrl.sampler.state import State

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
Filters = tuple[int, float, float]  # top_k, top_p, min_p


def bucket(b: int, device: torch.device) -> int:
    """Rows a step runs with to decode b: the next size with a graph; on CPU b itself."""
    if device.type == "cpu":
        return b
    place = bisect_left(BUCKETS, b)
    return BUCKETS[place] if place < len(BUCKETS) else -(-b // BUCKETS[-1]) * BUCKETS[-1]


class DecodeStep:
    """token -> layers -> head -> draw -> records, for rows of `state`.  The host reads no value of it."""

    def __init__(self, model: LanguageModel, state: State, logits_dtype: torch.dtype = torch.float32) -> None:
        self.model, self.state = model, state
        self.logits_dtype = torch.promote_types(model.dtype, logits_dtype)
        self.seconds = {"decode": 0.0, "sample": 0.0}  # right only where the host waits for each op

    def __call__(self, b: int, filters: Filters) -> None:
        """Draw one token for each of the first b rows that is alive."""
        state, began = self.state, time.perf_counter()
        rows = Rows(*(column[:b] for column in state.rows))
        new = newest(rows, state.records, state.key, state.cache.page)
        logits = self._logits(rows, new)
        drawn_at = time.perf_counter()
        advance(
            self._draw(logits, rows, new, filters),
            rows,
            state.records,
            state.cache.pages,
            stops=state.stops,
            version=state.version,
            total=state.total,
            page=state.cache.page,
        )
        self.seconds["decode"] += drawn_at - began
        self.seconds["sample"] += time.perf_counter() - drawn_at

    def _logits(self, rows: Rows, new: Newest) -> Tensor:
        """(b, V) after each row's newest token."""
        model = self.model
        hidden = self._cached(rows, new) if model.supports_cache else self._whole(rows)
        return project(hidden, model.head_weight, model.head_bias, self.logits_dtype)

    def _draw(self, logits: Tensor, rows: Rows, new: Newest, filters: Filters) -> Sample:
        state, b = self.state, logits.shape[0]
        top_k, top_p, min_p = filters
        return ops.sample(
            logits,
            seed=state.seed[:b],
            sequence=new.key,
            position=rows.drawn,
            temperature=state.temperature[:b],
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )

    def _cached(self, rows: Rows, new: Newest) -> Tensor:
        """Hidden states (b, D) of each row's newest token; its key and value go to the cache."""
        attend = self.state.cache.decode(new.slot, rows.table, new.length)
        return self.model(rows.last, None, positions=new.position, attend=attend)

    def _whole(self, rows: Rows) -> Tensor:
        """The same for a model without a cache, which forwards every sequence whole."""
        inside = torch.arange(self.state.C, device=rows.length.device) < rows.length[:, None]
        tokens = self.state.records.tokens[rows.seq][inside]
        ends = torch.cat([rows.length.new_zeros(1), rows.length.cumsum(0)])
        return self.model(tokens, ends.to(torch.int32))[ends[1:] - 1]


class Graphs:
    """The step as CUDA graphs that share one memory pool, each the whole step, captured when first needed.

    A graph holds the kernels that were chosen when it was captured: exact mode, or another backend, has
    graphs of its own, and so has each set of filters, whose sampling kernels differ.  They live as long as
    the cache that they read: `Engine.release`, which `keep_cache=False` calls after every call, drops them,
    and the next call captures those that it needs.  Each capture waits for the device and returns unused
    memory to it (torch.cuda.graph does), once per size of the step and set of filters.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step, self.pool = step, torch.cuda.graph_pool_handle()
        self.captured: dict[tuple[int, Filters, tuple[object, ...]], torch.cuda.CUDAGraph] = {}

    def __call__(self, b: int, filters: Filters) -> None:
        """Replay the step of the first b rows."""
        key = b, filters, asked()
        if key not in self.captured:
            graph = self._capture(b, filters)
            key = b, filters, asked()  # warming up may have proven a kernel
            self.captured[key] = graph
        self.captured[key].replay()

    def _capture(self, b: int, filters: Filters) -> torch.cuda.CUDAGraph:
        """Warm up and capture with no row alive: nothing is drawn, and all writes repeat what is there, or go
        to page 0.  The rows are alive again afterwards, also when that fails.
        """
        alive = self.step.state.rows.alive
        with on_device(alive):  # streams are of the current device, which need not be the model's
            before = alive.clone()
            alive.fill_(False)
            try:
                return self._record(b, filters)
            finally:
                alive.copy_(before)

    def _record(self, b: int, filters: Filters) -> torch.cuda.CUDAGraph:
        """The step of the first b rows as a graph, recorded on a stream of the current device.

        torch.cuda.graph would record on one stream of the process, which is the first device's.
        """
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # Triton compiles, cuBLAS chooses
                self.step(b, filters)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=self.pool, stream=side):
            self.step(b, filters)
        return graph


def runner(step: DecodeStep, device: torch.device) -> Callable[[int, Filters], None]:
    """How the step runs on this device: as graphs on CUDA, for a model with a cache; as plain calls
    elsewhere.
    """
    return Graphs(step) if device.type == "cuda" and step.model.supports_cache else step
