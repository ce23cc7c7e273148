"""One case under every schedule: findings, errors against the truth, the same bits."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton.errors import TritonError

from fastrl.bench.offline import recorded
from ptx.cases.case import Build, Case, allowed, error, same
from ptx.launch import SCHEDULES, Change, Ran, interpreted
from ptx.parse import Fault


@dataclass(slots=True)
class Verdict:
    """What the gate says of a case; it passed without `complaints`."""

    case: str
    complaints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launches: int = 0
    instructions: int = 0
    seconds: float = 0.0  # of the processor, compiling included
    interpreting: float = 0.0
    errors: list[float] = field(default_factory=list)  # as parts of what is allowed, the largest


def judge(
    name: str,
    build: Build,
    *,
    bias: str = "mixed",
    change: Change | None = None,
    seen: dict[str, Ran] | None = None,
    first: bool = False,
) -> Verdict:
    """Run a case under every schedule; whatever goes wrong becomes a complaint.

    `seen` receives the launches by kernel; `first` stops at the first schedule that complains.
    """
    verdict, began = Verdict(name), time.process_time()
    torch.manual_seed(0)
    try:
        for ran in _schedules(verdict, build(), bias, change):
            if seen is not None:
                seen.update((launch.kernel, launch) for launch in ran)
            if first and verdict.complaints:
                break
    except (Fault, TritonError, RuntimeError) as e:  # the compiler's, too, are findings
        last = traceback.extract_tb(e.__traceback__)[-1]
        verdict.complaints.append(f"{type(e).__name__}: {e} ({last.filename}:{last.lineno})")
    verdict.seconds = time.process_time() - began
    return verdict


def _schedules(verdict: Verdict, case: Case, bias: str, change: Change | None) -> Iterator[Sequence[Ran]]:
    """Run the case under one schedule after the other, and give the launches of each."""
    first: list[Tensor] | None = None
    for name, schedule in SCHEDULES.items():
        with (case.interpreted or interpreted)(schedule, bias=bias, change=change) as ran:
            got = [x.clone() for x in case.run()]
        _add(verdict, name, ran)
        verdict.complaints += _wrong(name, case, got, verdict)
        if first is None:
            first = got
        elif not all(same(a, b) for a, b in zip(first, got, strict=True)):
            verdict.complaints.append(f"{name}: other bits than under {next(iter(SCHEDULES))}")
        yield ran


def launched(cases: dict[str, Build]) -> set[str]:
    """file.kernel of every launch of these cases; nothing is compiled or run."""
    with recorded(90) as launches:
        for build in cases.values():
            torch.manual_seed(0)
            build().run()
    return {launch.name for launch in launches}


def _add(verdict: Verdict, schedule: str, ran: Sequence[Ran]) -> None:
    if not ran:
        verdict.complaints.append(f"{schedule}: nothing was launched")
    for launch in ran:
        verdict.launches += 1
        verdict.instructions += launch.instructions
        verdict.interpreting += launch.seconds
        verdict.complaints += [f"{schedule}, {launch.kernel}: {f}" for f in launch.findings]
        verdict.notes += [f"{schedule}, {launch.kernel}: {n}" for n in launch.notes]


def _wrong(schedule: str, case: Case, got: Sequence[Tensor], verdict: Verdict) -> list[str]:
    """Results that are too far from the truth."""
    if len(got) != len(case.outputs):
        return [f"{schedule}: {len(got)} results, expected {len(case.outputs)}"]
    out = []
    for n, (x, output) in enumerate(zip(got, case.outputs, strict=True)):
        if x.numel() == 0 and output.want.numel() == 0:
            continue
        off, most = error(x, output.want), allowed(output)
        verdict.errors.append(off / most if most else float(off > 0))
        if not off <= most:
            out.append(f"{schedule}: result {n} is off by {off:.2e}, allowed {most:.2e}")
    return out
