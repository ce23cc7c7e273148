"""Runs one `Bench`: builds its providers, checks them against float64, measures them in turns, makes rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import (
    BOTH,
    COMPILE,
    ELSEWHERE,
    OURS,
    PRODUCTS,
    Bench,
    Case,
    Data,
    Function,
    Unavailable,
)
from fastrl.bench.ledger import ALL, FAILED, LEFT_OUT, OK, UNAVAILABLE, Percentiles, Row
from fastrl.bench.timing import Call, Effort, Samples, Timer, measure, peak_bytes, percentile, timer_for
from fastrl.kernels._backend import COMPILED_ONLY, EXACT_ONLY, devices

REASON = 300  # characters of an error that a row keeps


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    effort         how long to measure
    compile        whether torch.compile takes part
    compiled_only  whether kernels that are only known to compile take part
    deadline       on the clock of time.monotonic: after it no further case starts.  After an op's share of
                   the time torch.compile, which compiles for seconds in each case, is left out
    """

    effort: Effort
    compile: bool = True
    compiled_only: bool = False
    deadline: float = float("inf")


@dataclass(slots=True)
class Runner:
    """A provider in one case."""

    provider: str
    name: str  # its key in `Bench.providers`
    function: Function | None = None
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    default: bool = False
    status: str = OK
    reason: str = ""
    call: Call = lambda: None
    samples: Samples = field(default_factory=dict)
    peak: int | None = None
    error: float | None = None
    relative: float | None = None
    details: dict[str, float] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """Drop the numbers of this provider; its row gives the reason."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.status, self.reason, self.samples = FAILED, text[:REASON], {}


def run_case(bench: Bench, case: Case, plan: Plan, *, share_over: bool = False) -> list[Row]:
    """The rows of one case.  `share_over`: the op has used up its share of the time."""
    runners = list(_runners(bench, case, plan, share_over))
    # otherwise a backward on CUDA would run in a thread of autograd, which does not see the backend asked for
    with torch.autograd.set_multithreading_enabled(False):
        _check(bench, case, runners)
        data = bench.data(case)
        for runner in _live(runners):
            attempt(runner, lambda r: _prepare(r, bench, case, data))
        _measure(_live(runners), timer_for(torch.device(case.device), bench.wall), plan.effort)
        for runner in _live(runners):
            attempt(runner, lambda r: _detail(r, bench, case))
    if plan.compile:
        torch._dynamo.reset()  # other cases cannot use the graphs of these shapes
    return [_row(bench, case, r) for r in runners]


def _measure(runners: list[Runner], timer: Timer, effort: Effort) -> None:
    by_name = {r.provider: r for r in runners}
    calls = {n: r.call for n, r in by_name.items()}
    contexts = {n: r.context for n, r in by_name.items()}
    samples = measure(calls, timer, effort, lambda n, error: by_name[n].fail(error), contexts)
    for name, taken in samples.items():
        by_name[name].samples = taken


def _detail(runner: Runner, bench: Bench, case: Case) -> None:
    if bench.details is not None:
        runner.details = bench.details(case, runner.function, percentile(runner.samples["warm"], 0.5))  # type: ignore[arg-type]


def left_out(bench: Bench, case: Case, reason: str) -> Row:
    """The row of a case that was not started."""
    return _row(bench, case, Runner(ALL, "", status=LEFT_OUT, reason=reason))


def attempt(runner: Runner, work: Callable[[Runner], Any]) -> None:
    """Run a provider's code; what it raises becomes its row."""
    try:
        with runner.context():
            work(runner)
    except Exception as error:  # the boundary to other people's code, which may raise anything
        runner.fail(error)


# --- providers --------------------------------------------------------------------------------------
def _runners(bench: Bench, case: Case, plan: Plan, share_over: bool) -> Iterator[Runner]:
    """Every provider of the case, built; ours once per implementation, torch.compile last."""
    for name in sorted(bench.providers, key=lambda n: n.startswith(COMPILE)):
        if name.startswith(COMPILE) and share_over:
            yield Runner(name, name, status=LEFT_OUT, reason="this op's share of the time is over")
            continue
        if name.startswith(COMPILE) and not plan.compile:
            yield Runner(name, name, status=LEFT_OUT, reason="compilation takes longer than a quick run")
            continue

        variants: Iterable[Runner] = [Runner(name, name)]
        if name.startswith(OURS) and bench.registry:
            variants = _implementations(name, bench, case, plan)
        for runner in variants:
            if runner.status == OK:
                _build(runner, bench, case)
            if runner.status != OK or runner.function is not None:
                yield runner


def _build(runner: Runner, bench: Bench, case: Case) -> None:
    try:
        runner.function = bench.providers[runner.name](case)
    except Unavailable as error:
        runner.status, runner.reason = UNAVAILABLE, str(error)
    except Exception as error:  # the boundary to other people's code, which may raise anything
        runner.fail(error)


def _implementations(name: str, bench: Bench, case: Case, plan: Plan) -> Iterator[Runner]:
    """fastrl/reference, fastrl/cpu, ...: the implementations for the case's device."""
    op, chosen = bench.registry, ops.backend(case.device)[bench.registry]
    variant = name.removeprefix(OURS)
    for backend, state in ops.implementations()[op].items():
        if case.device not in devices(op, backend):
            continue
        runner = Runner(f"{OURS}/{backend}{variant}", name, default=backend == chosen and not variant)
        runner.context = lambda backend=backend: ops.use_backend(backend, op)  # type: ignore[misc]
        if state == COMPILED_ONLY and not plan.compiled_only:
            runner.status, runner.reason = UNAVAILABLE, f"{COMPILED_ONLY}: --gpu-check runs it"
        elif state not in ("ready", COMPILED_ONLY, EXACT_ONLY):
            runner.status, runner.reason = UNAVAILABLE, state
        yield runner


def _live(runners: list[Runner]) -> list[Runner]:
    return [r for r in runners if r.status == OK]


# --- calls ------------------------------------------------------------------------------------------
def evaluate(function: Function, data: Data, mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and, with a backward, gradients of the differentiated arguments."""
    if mode != BOTH:
        with torch.no_grad():
            return _tuple(function(**data.args)), []
    outputs = _tuple(function(**data.args))
    leaves = [data.args[n] for n in data.wrt]
    if not data.upstream:
        return outputs, list(torch.autograd.grad(outputs[0], leaves))
    pairs = list(zip(outputs, data.upstream, strict=False))
    return outputs, list(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs]))


def _tuple(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _own(data: Data, bench: Bench, case: Case, name: str = "") -> Data:
    """The data of one provider: copies of what it writes to, fresh leaves of what is differentiated."""
    if name in bench.mutates:
        data = data.map(torch.clone, bench.mutates[name])
    if case.mode != BOTH:
        return data
    return data.map(lambda x: x.detach().requires_grad_(), data.wrt)


def _prepare(runner: Runner, bench: Bench, case: Case, data: Data) -> None:
    """Make the call that is timed, run it once, which compiles it if need be, and measure its memory."""
    own_data, function = _own(data, bench, case, runner.name), runner.function
    assert function is not None, runner.provider

    def call() -> Any:
        return evaluate(function, own_data, case.mode)

    call()
    if not hasattr(function, ELSEWHERE):
        runner.peak = peak_bytes(call, torch.device(case.device))
    runner.call = call


# --- errors -----------------------------------------------------------------------------------------
def _check(bench: Bench, case: Case, runners: list[Runner]) -> None:
    """Set the errors of every provider but the bound, and torch.compile, which would compile again."""
    if bench.truth is None:
        return
    small = case.small()
    definition = bench.truth(small)
    assert definition is not None, bench.op
    data = bench.data(small)
    truth = evaluate(definition, _own(data.wide(), bench, small), small.mode)

    def set_errors(runner: Runner) -> None:
        assert runner.function is not None, runner.provider
        results = evaluate(runner.function, _own(data, bench, small, runner.name), small.mode)
        runner.error, runner.relative = errors(results, truth)

    for runner in _live(runners):
        if not runner.provider.startswith(COMPILE) and runner.provider != PRODUCTS:
            attempt(runner, set_errors)


def errors(
    found: tuple[list[Tensor], list[Tensor]], truth: tuple[list[Tensor], list[Tensor]]
) -> tuple[float, float]:
    """Absolute error of the first output; the worst error of any output or gradient, over its largest value.

    Outputs that the truth does not have, and rows that the provider does not compute, are not compared.  A
    NaN is an infinite error.
    """
    absolute, relative = [], []
    for ours, exact in zip(found, truth, strict=True):  # outputs, gradients
        for x, true in zip(ours, exact, strict=False):
            error, largest = _error(x.detach(), true.detach())
            absolute.append(error)
            relative.append(error / max(largest, 1e-30))
    return absolute[0], max(relative)


def _error(x: Tensor, true: Tensor) -> tuple[float, float]:
    """The largest error of `x`, and the largest true value; 0 for no elements."""
    true = true[: x.shape[0]] if true.ndim else true
    if not true.numel():
        return 0.0, 0.0
    error = (x.double() - true).abs().amax().item()
    return (float("inf") if math.isnan(error) else error), true.abs().amax().item()


# --- rows -------------------------------------------------------------------------------------------
def _row(bench: Bench, case: Case, r: Runner) -> Row:
    cost = bench.cost(case)
    return Row(
        op=bench.op,
        case=case.label,
        shape=dict(case.shape),
        dtype=case.dtype,
        mode=case.mode,
        headline=case.headline,
        provider=r.provider,
        status=r.status,
        reason=r.reason,
        default=r.default,
        ms={cache: _percentiles(found) for cache, found in r.samples.items()},
        samples=max(map(len, r.samples.values()), default=0),
        bytes=cost.bytes,
        flops=cost.flops,
        tokens=cost.tokens,
        peak_bytes=r.peak,
        error=_finite(r.error),
        relative_error=_finite(r.relative),
        details=r.details,
    )


def _percentiles(found: list[float]) -> Percentiles:
    return percentile(found, 0.2), percentile(found, 0.5), percentile(found, 0.8)


def _finite(x: float | None) -> float | None:
    """JSON has no infinity: an infinite error is written as a very large one."""
    return None if x is None else min(x, 1e300)


def run_bench(bench: Bench, chosen: list[Case], plan: Plan, share: float) -> Iterator[Row]:
    """The rows of an op's cases; its share of the time ends at `share`, on the clock of time.monotonic."""
    for case in chosen:
        if time.monotonic() > plan.deadline:
            yield left_out(bench, case, "the run's time is over")
            continue
        try:
            yield from run_case(bench, case, plan, share_over=time.monotonic() > share)
        except RuntimeError as error:  # no memory for the inputs, or an earlier kernel broke the device
            whole = Runner(ALL, "")
            whole.fail(error)
            yield _row(bench, case, whole)
