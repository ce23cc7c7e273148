"""One case, run and judged: right within its budget, nothing else changed, and the same bits every time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels._budget import allowed_error, largest_error
from fastrl.kernels._verdicts.case import Arguments, Case, Sizes, each_tensor, replaced, tensors
from fastrl.kernels._verdicts.guard import RedZones, allocations

try:
    from triton.errors import TritonError
except ModuleNotFoundError:  # it has no wheels outside Linux
    TritonError = RuntimeError

Parts = Mapping[str, Callable[..., Any]]
# what a launch that cannot be compiled or made raises
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FAILURES = (*FAILURES, TritonError)  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case showed; the numbers are of the output that comes closest to its budget, or exceeds it."""

    reason: str = ""  # why it failed
    error: float = 0.0
    allowed: float = 0.0

    @property
    def fraction(self) -> float:
        """The error as a fraction of the budget."""
        return self.error / self.allowed if self.allowed else 0.0


def judge(case: Case, ours: Parts, reference: Parts, sizes: Sizes) -> Outcome:
    """Run the case with `ours` and compare with `reference`.  Waits for the device."""
    truth, like = run_plainly(widened(case), reference), run_plainly(case, reference)
    zones = RedZones()
    args = each_tensor(case.args, zones.copy)
    got = run_guarded(case, ours, args, zones)
    if not zones.intact():
        return Outcome("it writes outside its tensors")
    if changed(case, args):
        return Outcome("it changes an input")

    outcome = compare(got, like, truth, case.floor, sizes.ulps)
    if outcome.reason:
        return outcome
    first = [x.clone() for x in got]
    with rival(first):
        return again(case, ours, first, sizes.repeats) or outcome


def widened(case: Case) -> Case:
    """The case in float64: its tensors, and a dtype that it is asked to compute in."""
    args = each_tensor(case.args, lambda x: x.double() if x.is_floating_point() else x)
    return replaced(case, args=tuple(torch.float64 if isinstance(x, torch.dtype) else x for x in args))


def run_plainly(case: Case, parts: Parts) -> list[Tensor]:
    """The outputs of a call on copies of the arguments."""
    args = each_tensor(case.args, torch.clone)
    return case.defined(outputs(parts[case.part](*args), args, case.writes))


def run_guarded(case: Case, parts: Parts, args: Arguments, zones: RedZones) -> list[Tensor]:
    with allocations(zones):
        result = parts[case.part](*args)
    return case.defined(outputs(result, args, case.writes))


def outputs(result: Any, args: Arguments, writes: tuple[int, ...]) -> list[Tensor]:
    """What a call returns and writes, each tensor once."""
    found = [*tensors(result), *(t for i in writes for t in tensors(args[i]))]
    return list({id(x): x for x in found}.values())


def changed(case: Case, args: Arguments) -> bool:
    """Whether an argument that is only read differs from what it was."""
    free = {*case.writes, *case.scratch}
    for i, (was, now) in enumerate(zip(case.args, args, strict=True)):
        pairs = zip(tensors(was), tensors(now), strict=True)
        if i not in free and not all(same_bits(a, b) for a, b in pairs):
            return True
    return False


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return bool(torch.equal(left, right))


def compare(got: list[Tensor], like: list[Tensor], truth: list[Tensor], floor: float, ulps: float) -> Outcome:
    """The outcome of the outputs, the worst of them."""
    if len(got) != len(truth):
        return Outcome(f"expected {len(truth)} results, got {len(got)}")
    worst = Outcome()
    for i, (x, theirs, exact) in enumerate(zip(got, like, truth, strict=True)):
        one = compare_one(x, theirs, exact, floor, ulps)
        if one.reason:
            return Outcome(f"result {i}: {one.reason}", one.error, one.allowed)
        worst = max(worst, one, key=lambda o: o.fraction)
    return worst


def compare_one(x: Tensor, theirs: Tensor, exact: Tensor, floor: float, ulps: float) -> Outcome:
    if x.shape != theirs.shape or x.dtype != theirs.dtype:
        return Outcome(f"expected {theirs.dtype} {tuple(theirs.shape)}, got {x.dtype} {tuple(x.shape)}")
    if not x.is_floating_point():
        wrong = int((x != exact).sum())
        return Outcome(f"{wrong} of {x.numel()} numbers are wrong", float(wrong)) if wrong else Outcome()

    nan = exact.isnan()
    if not torch.equal(x.isnan(), nan):
        return Outcome(f"NaN in {int((x.isnan() != nan).sum())} of {x.numel()} wrong places")
    x, theirs, exact = (torch.where(nan, 0, y) for y in (x, theirs, exact))
    infinite = exact.isinf()
    if not torch.equal(torch.where(infinite, x.double(), 0), torch.where(infinite, exact, 0)):
        return Outcome("an infinity is wrong")
    x, theirs, exact = (torch.where(infinite, 0, y) for y in (x, theirs, exact))
    error = largest_error(x, exact)
    allowed = max(allowed_error(theirs, exact, x.dtype, ulps=ulps), floor)
    reason = f"error {error:.2e} against float64, allowed {allowed:.2e}" if error > allowed else ""
    return Outcome(reason, error, allowed)


# --- the same bits ----------------------------------------------------------------------------------
def again(case: Case, parts: Parts, first: list[Tensor], repeats: int) -> Outcome | None:
    """What repetitions show, on fresh memory and over the memory of an input: None if they are right."""
    for number in range(repeats):
        zones = RedZones()
        args = each_tensor(case.args, zones.copy)
        in_place = case.over is not None and number % 2 == 1
        if in_place and case.over is not None:
            args = lay_over(args, *case.over)
        got = run_guarded(case, parts, args, zones)
        where = "in place" if in_place else "repeated"
        if not zones.intact():
            return Outcome(f"{where}, it writes outside its tensors")
        if not all(same_bits(a, b) for a, b in zip(got, first, strict=True)):
            return Outcome(f"{where}, it gives other bits (call {number + 2})")
    return None


def lay_over(args: Arguments, out: int, base: int) -> Arguments:
    """The arguments with the output at `out` in the memory of the one at `base`, at the front of its rows."""
    laid = list(args)
    x, y = args[base], args[out]
    laid[out] = x if x.dtype == y.dtype else x.view(y.dtype)[..., : y.shape[-1]]
    return tuple(laid)


@contextlib.contextmanager
def rival(like: list[Tensor]) -> Iterator[None]:
    """Other work on the device, on a stream of its own, while the block enqueues its calls."""
    device = next((x.device for x in like), torch.device("cpu"))
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    a = torch.ones(2048, 2048, dtype=torch.bfloat16, device=device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(64):
            torch.mm(a, a)
    yield
    torch.cuda.current_stream(device).wait_stream(stream)
