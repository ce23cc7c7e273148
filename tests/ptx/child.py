"""Runs cases in a process of its own: one line of JSON for each.

    PYTHONPATH=.:tests python -m ptx.child                      # names on standard input, a line each
    PYTHONPATH=.:tests python -m ptx.child "swiglu fp32" ...    # or as arguments; --all: all of them

TRITON_INTERPRET must not be set: kernels would not be compiled.  The version of Triton is that of PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import torch

from ptx.cases.table import CASES, LONG
from ptx.gate import judge

GROUPS = {"--all": CASES, "--long": LONG}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    names: Iterable[str] = arguments or (line.rstrip("\n") for line in sys.stdin)
    table = CASES | LONG
    for name in names:
        for one in GROUPS.get(name, [name]):
            print(json.dumps(judge(one, table[one]).as_dict()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
