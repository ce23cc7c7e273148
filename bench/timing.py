"""How long things take: fair samples of several providers in one process, and the hardware's measured limits.

Providers take turns: every round runs each of them once, in an order that rotates and reverses, so that
clocks, heat and other load affect all of them alike.  On CUDA a sample is timed by device events behind a
kernel that keeps the device busy until the work is queued: the device never waits for Python.  "cold" samples
flush the L2 cache before each call.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from fastrl import ops

Call = Callable[[], Any]
Samples = dict[str, list[float]]  # "cold" or "warm" -> milliseconds of one call, each
MIN_ROUNDS, MAX_REPEATS, WARM_UP = 3, 50, 3
HOLD_MS = 40.0  # the longest time to keep the device busy while work is queued


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: most rounds, milliseconds of one sample, milliseconds of all samples of a case."""

    rounds: int
    sample_ms: float
    case_ms: float


# --- statistics -------------------------------------------------------------------------------------
def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated; NaN of none."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def turn(names: Sequence[str], round_: int) -> list[str]:
    """The order of a round: rotated by one every second round, and reversed in between.

    No provider keeps its place or its neighbour for long.
    """
    if not names:
        return []
    k = (round_ // 2) % len(names)
    order = [*names[k:], *names[:k]]
    return order[::-1] if round_ % 2 else order


# --- timers -----------------------------------------------------------------------------------------
class Timer(Protocol):
    """Takes samples of a call under each of its `caches`."""

    caches: tuple[str, ...]

    def sample(self, call: Call, repeats: int, cache: str) -> list[float]:
        """Milliseconds of one call: one number, or one for each repeat."""
        ...


class WallTimer:
    """The wall clock; waits for a CUDA device before and after."""

    caches: tuple[str, ...] = ("warm",)

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample(self, call: Call, repeats: int, cache: str) -> list[float]:
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return [(time.perf_counter() - began) * 1e3 / repeats]


class EventTimer:
    """CUDA events."""

    caches: tuple[str, ...] = ("cold", "warm")

    def __init__(self, device: torch.device) -> None:
        bytes_ = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(bytes_, 1 << 26), dtype=torch.uint8, device=device)
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        (took,) = self._timed([lambda: torch.cuda._sleep(cycles)])
        self.cycles_per_ms = cycles / took
        self.host_ms: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def sample(self, call: Call, repeats: int, cache: str) -> list[float]:
        torch.cuda.synchronize()
        if call not in self.host_ms:
            self.host_ms[call] = self._queueing_ms(call)
        hold_ms = min(1.5 * self.host_ms[call] * repeats + 0.2, HOLD_MS)
        torch.cuda._sleep(int(hold_ms * self.cycles_per_ms))
        if cache == "cold":
            return self._timed([call] * repeats, self.flush.zero_)

        def all_repeats() -> None:
            for _ in range(repeats):
                call()

        return [self._timed([all_repeats])[0] / repeats]

    @staticmethod
    def _queueing_ms(call: Call) -> float:
        """How long Python takes to queue a call, once it is warm."""
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        took = (time.perf_counter() - began) * 1e3
        torch.cuda.synchronize()
        return took

    @staticmethod
    def _timed(calls: Sequence[Call], before: Call = lambda: None) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            before()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def timer_for(device: torch.device, wall: bool) -> Timer:
    """Events on CUDA unless the wall clock is asked for."""
    return WallTimer(device) if wall or device.type != "cuda" else EventTimer(device)


# --- measuring --------------------------------------------------------------------------------------
@contextmanager
def steady() -> Iterator[None]:
    """Collect garbage before, and none inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(
    calls: Mapping[str, Call],
    timer: Timer,
    effort: Effort,
    failed: Callable[[str, Exception], None],
    contexts: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> dict[str, Samples]:
    """Samples of every call, each taken inside its context.

    A call that raises is reported to `failed` and leaves the rotation; the others go on.
    """
    around = contexts or {}
    live = dict(calls)
    repeats: dict[str, int] = {}
    spent_ms = 0.0
    samples: dict[str, Samples] = {name: {cache: [] for cache in timer.caches} for name in calls}

    def attempt(name: str, work: Call) -> Any:
        try:
            with around.get(name, nullcontext)():
                return work()
        except Exception as error:  # the boundary to other people's code, which may raise anything
            failed(name, error)
            del live[name], samples[name]
            return None

    def sample(name: str) -> None:
        for cache, found in samples[name].items():
            found += timer.sample(live[name], repeats[name], cache)

    with steady():
        for name in list(live):
            once = attempt(name, lambda name=name: _estimate(live[name], timer))  # type: ignore[misc]
            if once is not None:
                repeats[name] = max(1, min(MAX_REPEATS, int(effort.sample_ms / max(once, 1e-6))))
                spent_ms += once * repeats[name] * len(timer.caches)
        rounds = max(MIN_ROUNDS, min(effort.rounds, int(effort.case_ms / max(spent_ms, 1e-6))))
        for round_ in range(rounds):
            for name in turn(list(live), round_):
                attempt(name, lambda name=name: sample(name))  # type: ignore[misc]
    return samples


def _estimate(call: Call, timer: Timer) -> float:
    """Milliseconds of a warm call; a slow one is not called again to warm up."""
    once = math.inf
    for _ in range(WARM_UP):
        once = min(once, timer.sample(call, 1, "warm")[0])
        if once > 200:
            break
    return once


# --- memory -----------------------------------------------------------------------------------------
def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that torch's allocator holds during a call, beyond that held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # some builds of torch announce every profile on standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    del result
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak


# --- the hardware's limits --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Ceilings:
    """The limits of the hardware, measured in this run.

    copy_gb_s    bytes read plus written per second by a copy
    gemm_tflop_s of a matrix product
    gemm         size and dtype of that product
    """

    copy_gb_s: float
    gemm_tflop_s: float
    gemm: str

    def floor_ms(self, bytes_: int, flops: int) -> float:
        """The least time of that traffic and arithmetic, if they overlap."""
        return max(bytes_ / self.copy_gb_s * 1e-6, flops / self.gemm_tflop_s * 1e-9)


def ceilings(device: torch.device, quick: bool) -> Ceilings:
    """Measure them with a copy far larger than any cache, and a square product of random numbers.

    A product of zeros would run faster.  On CPU the faster of torch's product and ours counts: torch's is not
    always the limit of the processor.
    """
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024 if quick else 2048, torch.float32)
    cpu_size = 1 << 26 if quick else 1 << 28
    size = 1 << 30 if cuda else cpu_size
    # ones, because pages of zeros may be shared
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}
    if not cuda:
        calls["linear"] = lambda: ops.linear(a, b)

    problems: list[Exception] = []
    timer, effort = timer_for(device, wall=False), Effort(5 if quick else 15, 1.0, 3_000.0)
    taken = measure(calls, timer, effort, lambda _, error: problems.append(error))
    if problems:
        raise problems[0]

    copy_ms, *products = (percentile(taken[name]["warm"], 0.2) for name in calls)
    gemm_ms = min(products)
    return Ceilings(
        copy_gb_s=2 * size / copy_ms * 1e-6,
        gemm_tflop_s=2 * n**3 / gemm_ms * 1e-9,
        gemm=f"{n}^3 {str(dtype).removeprefix('torch.')}",
    )
