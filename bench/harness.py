"""Runs one `Bench`: builds its providers, checks them against float64, measures them side by side, and turns
all into rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    """What a run does: the effort, whether torch.compile and kernels that are only known to compile take
    part, and until when.

    `deadline` is on time.monotonic's clock: past it no further case starts; past an op's own share of the
    time, torch.compile (seconds of compilation for each case) is left out.
    """

    effort: Effort
    compile: bool = True
    compiled_only: bool = False
    deadline: float = float("inf")


@dataclass(slots=True)
class Runner:
    """A provider on its way through a case."""

    provider: str
    name: str  # under which the benchmark knows it
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
        """This provider's numbers end here; the row says why."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.status, self.reason, self.samples = FAILED, text[:REASON], {}


def run_case(bench: Bench, case: Case, plan: Plan, *, share_over: bool = False) -> list[Row]:
    """The rows of one case.  `share_over`: the op has used up its share of the time."""
    runners = list(_runners(bench, case, plan, share_over))
    # a backward on CUDA runs in a thread of autograd's own, where the backend asked for here would not be
    # seen
    with torch.autograd.set_multithreading_enabled(False):
        _check(bench, case, runners)
        data = bench.data(case)
        for runner in _live(runners):
            attempt(runner, lambda r: _prepare(r, bench, case, data))
        _measure(_live(runners), timer_for(torch.device(case.device), bench.wall), plan.effort)
        for runner in _live(runners):
            attempt(runner, lambda r: _detail(r, bench, case))
    if plan.compile:
        torch._dynamo.reset()  # graphs of this case's shapes are of no use to the next
    return [_row(bench, case, r) for r in runners]


def _measure(runners: list[Runner], timer: Timer, effort: Effort) -> None:
    by_name = {r.provider: r for r in runners}
    calls, contexts = {n: r.call for n, r in by_name.items()}, {n: r.context for n, r in by_name.items()}
    for name, found in measure(
        calls, timer, effort, lambda n, error: by_name[n].fail(error), contexts
    ).items():
        by_name[name].samples = found


def _detail(runner: Runner, bench: Bench, case: Case) -> None:
    if bench.details is not None:
        runner.details = bench.details(case, runner.function, percentile(runner.samples["warm"], 0.5))  # type: ignore[arg-type]


def left_out(bench: Bench, case: Case, reason: str) -> Row:
    """The row of a case that was not started."""
    return _row(bench, case, Runner(ALL, "", status=LEFT_OUT, reason=reason))


def attempt(runner: Runner, work: Callable[[Runner], Any]) -> None:
    """Do something with a provider's code; whatever it raises becomes its row."""
    try:
        with runner.context():
            work(runner)
    except Exception as error:  # the boundary to other people's code, which may raise anything
        runner.fail(error)


# --- providers --------------------------------------------------------------------------------------
def _runners(bench: Bench, case: Case, plan: Plan, share_over: bool) -> Iterator[Runner]:
    """Every provider of the case, built; ours once per implementation, torch.compile last."""
    for name in sorted(bench.providers, key=lambda n: n.startswith(COMPILE)):
        if name.startswith(COMPILE) and (share_over or not plan.compile):
            reason = (
                "this op's share of the time is over"
                if share_over
                else "compilation takes longer than a quick run"
            )
            yield Runner(name, name, status=LEFT_OUT, reason=reason)
            continue
        variants = (
            _implementations(name, bench, case, plan)
            if name.startswith(OURS) and bench.registry
            else [Runner(name, name)]
        )
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
    """fastrl/reference, fastrl/cpu, ...: what the registry has for the case's device."""
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
    """A provider's own view of the data: copies of what it writes to,
    fresh leaves of what is differentiated.
    """
    mine = data.map(torch.clone, bench.mutates[name]) if name in bench.mutates else data
    if case.mode != BOTH:
        return mine
    return mine.map(lambda x: x.detach().requires_grad_(), mine.wrt)


def _prepare(runner: Runner, bench: Bench, case: Case, data: Data) -> None:
    """Make the call that is timed, run it once (which compiles what is to be compiled),
    and take its memory.
    """
    mine, function = _own(data, bench, case, runner.name), runner.function
    assert function is not None, runner.provider

    def call() -> Any:
        return evaluate(function, mine, case.mode)

    call()
    if not hasattr(function, ELSEWHERE):
        runner.peak = peak_bytes(call, torch.device(case.device))
    runner.call = call


# --- errors -----------------------------------------------------------------------------------------
def _check(bench: Bench, case: Case, runners: list[Runner]) -> None:
    """Errors of every provider but the bound, and torch.compile,
    which would compile once more for the slice.
    """
    if bench.truth is None:
        return
    small = case.small()
    definition = bench.truth(small)
    assert definition is not None, bench.op
    data = bench.data(small)
    truth = evaluate(definition, _own(data.wide(), bench, small), small.mode)

    def compare(runner: Runner) -> None:
        assert runner.function is not None, runner.provider
        found = evaluate(runner.function, _own(data, bench, small, runner.name), small.mode)
        runner.error, runner.relative = errors(found, truth)

    for runner in _live(runners):
        if not runner.provider.startswith(COMPILE) and runner.provider != PRODUCTS:
            attempt(runner, compare)


def errors(
    found: tuple[list[Tensor], list[Tensor]], truth: tuple[list[Tensor], list[Tensor]]
) -> tuple[float, float]:
    """Absolute error of the first output; the worst error of any output or gradient over that tensor's
    largest true value.

    Outputs that the truth does not have, and rows that the provider does not compute, are not compared.  A
    NaN is an infinite error.
    """
    absolute, relative = [], []
    for ours, exact in (pair for o, e in zip(found, truth, strict=True) for pair in zip(o, e, strict=False)):
        exact = exact[: ours.shape[0]] if exact.ndim else exact
        error = (ours.detach().double() - exact.detach()).abs().amax().item() if exact.numel() else 0.0
        error = error if error == error else float("inf")
        absolute.append(error)
        relative.append(error / max(exact.detach().abs().amax().item(), 1e-30) if exact.numel() else 0.0)
    return absolute[0], max(relative)


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
    """JSON has no infinity: an error that is not a number is written as the largest there is."""
    return None if x is None else min(x, 1e300)


def run_bench(bench: Bench, chosen: list[Case], plan: Plan, share: float) -> Iterator[Row]:
    """The rows of an op's cases; `share` is when its share of the time ends, on time.monotonic's clock."""
    for case in chosen:
        if time.monotonic() > plan.deadline:
            yield left_out(bench, case, "the run's time is over")
            continue
        try:
            yield from run_case(bench, case, plan, share_over=time.monotonic() > share)
        except (
            RuntimeError
        ) as error:  # no memory for the inputs, or a device that an earlier kernel has broken
            whole = Runner(ALL, "")
            whole.fail(error)
            yield _row(bench, case, whole)
