"""The process that runs the checks: `python -m fastrl.kernels._verdicts.child`, with a request on its input.

It writes one JSON object a line: {"ready": true}, then for every case {"case": name} before and an outcome
after it, and {"job": n} when all cases of a job are done.  Whatever raises ends it: the parent knows the case
by its last line and goes on with another child, so that a crash, a hang or a broken CUDA context costs the op
its verdict and nobody else anything.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastrl.kernels._registry import Implementation, registered
from fastrl.kernels._verdicts.case import FULL, SMALL, Case, Make, Widths, tensors
from fastrl.kernels._verdicts.checks import CHECKS
from fastrl.kernels._verdicts.judge import judge
from fastrl.kernels._verdicts.variant import variant_text

Say = Callable[[dict[str, Any]], None]


def cases(op: str, impl: Implementation, make: Make) -> Iterator[Case]:
    """The cases of an op that this implementation takes."""
    for case in CHECKS[op].cases(make):
        if case.part in impl.parts and not obstacle(impl, case):
            yield case


def obstacle(impl: Implementation, case: Case) -> str:
    """Why the implementation cannot take the case's tensors on this device."""
    if impl.obstacle is None:
        return ""
    floats = (x for x in tensors(case.args) if x.is_floating_point())
    return impl.obstacle(next(floats))


def run_job(number: int, job: dict[str, Any], request: dict[str, Any], say: Say) -> None:
    """All cases of one (op, backend, dtype); a wrong result ends the job."""
    op, backend = job["op"], job["backend"]
    implementations = registered(op)
    impl, reference = implementations[backend], implementations["reference"]
    sizes = SMALL if request["small"] else FULL
    device = torch.device(request["device"])
    make = Make(getattr(torch, job["dtype"]), device, sizes, Widths(**request["widths"]))
    few = CHECKS[op].few

    for case in cases(op, impl, make):
        say({"case": f"{case.part} {case.name}"})
        outcome = judge(case, impl.parts, reference.parts, sizes)
        form = few[case.part].variant(*case.args) if case.part in few else ""
        say(
            {
                "reason": outcome.reason,
                "fraction": outcome.fraction,
                "variant": variant_text(case.part, form),
            }
        )
        if outcome.reason:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    say({"job": number})


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a kernel prints is not part of the answer

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    request = json.load(sys.stdin)
    for module in request["modules"]:
        importlib.import_module(module)
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    say({"ready": True})
    with torch.no_grad():
        for number, job in request["jobs"]:
            run_job(number, job, request, say)


if __name__ == "__main__":
    main()
