"""pytest again and again, each time in a child of a process that has imported what no fault is in.

Reads a line of JSON for each run, the arguments of pytest and a file for what it prints, and answers with a
line: its exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys

HEAVY = (
    "torch",
    "pytest",
    "numpy",
    "triton.language",
    "transformers",
    "tokenizers",
    "safetensors.torch",
    "tyro",
)


def run(arguments: list[str], file: str) -> int:
    """The exit code of pytest in a child, which writes to `file`."""
    child = os.fork()
    if child == 0:
        out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 3  # pytest's own for an internal error
        try:
            code = int(importlib.import_module("pytest").main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
