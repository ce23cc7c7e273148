"""Runs cases in a process of its own: one line of JSON for each request.

    PYTHONPATH=.:tests python -m ptx.child                      # requests on standard input, a line each
    PYTHONPATH=.:tests python -m ptx.child "swiglu fp32" ...    # or as arguments

    swiglu fp32                                  the verdict on a case
    mutants of rms_norm fp32 [inside KERNEL]     whether the gate notices each barrier that is taken away
    --all, --long, --cuda, --long-cuda           the verdicts on a group of cases
    version                                      of Triton
    kernels                                      the names of all that the cases of the gate launch

TRITON_INTERPRET must not be set: kernels would not be compiled.  The version of Triton is that of PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch
import triton

from ptx.cases.faults import FAULTS
from ptx.cases.table import CASES, CUDA, LONG, LONG_CUDA
from ptx.gate import judge, launched
from ptx.mutate import mutants

GROUPS = {"--all": CASES, "--long": LONG, "--cuda": CUDA, "--long-cuda": LONG_CUDA}
TABLE = CASES | LONG | CUDA | LONG_CUDA | FAULTS
MUTANTS, INSIDE = "mutants of ", " inside "


def answers(request: str) -> Iterator[dict[str, object]]:
    if request == "version":
        yield {"triton": triton.__version__}
    elif request == "kernels":
        yield {"kernels": sorted(launched(CASES))}
    elif request.startswith(MUTANTS):
        case, _, kernel = request.removeprefix(MUTANTS).partition(INSIDE)
        yield asdict(mutants(case, TABLE[case], kernel))
    else:
        for name in GROUPS.get(request, [request]):
            yield asdict(judge(name, TABLE[name]))


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    requests: Iterable[str] = arguments or (line.rstrip("\n") for line in sys.stdin)
    for request in requests:
        for answer in answers(request):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
