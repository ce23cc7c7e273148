"""Sizes: the tail is what makes a code base hard to read, so the tail is what is bounded.

The exceptions may only shrink: an entry that is no longer needed fails the test too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastrl": 300, "kernels": 300, "bench": 300, "tests": 400}  # lines a Python file may have
FUNCTION, P90 = 60, 30  # lines: the longest function, and the length that nine of ten stay within
NATIVE = 400  # lines of a file in csrc
LONGER: dict[str, int] = {}  # file, or file:function -> lines it has


def python_files(folder: str) -> list[Path]:
    return [
        p
        for p in sorted((ROOT / folder).rglob("*.py"))
        if folder != "fastrl" or p.relative_to(ROOT).parts[1] not in ("kernels", "bench")
    ]


def functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, methods and nested ones included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(files: dict[str, tuple[str, int]]) -> dict[str, int]:
    """What exceeds its bound: file -> lines, file:function -> lines.  `files` maps a path to its text and its
    bound.
    """
    found = {name: n for name, (text, bound) in files.items() if (n := len(text.splitlines())) > bound}
    for name, (text, _) in files.items():
        if name.endswith(".py"):
            found |= {f"{name}:{f}": n for f, n in functions(text) if n > FUNCTION}
    return found


def p90(lengths: list[int]) -> int:
    return sorted(lengths)[int(0.9 * (len(lengths) - 1))]


def repository() -> dict[str, tuple[str, int]]:
    files = {p: bound for folder, bound in FOLDERS.items() for p in python_files(folder)}
    files |= {p: NATIVE for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()}
    return {str(p.relative_to(ROOT)): (p.read_text(encoding="utf-8"), bound) for p, bound in files.items()}


def test_no_file_or_function_is_too_long():
    assert too_long(repository()) == LONGER


@pytest.mark.parametrize("folder", ["fastrl", "kernels", "bench"])
def test_nine_of_ten_functions_are_short(folder):
    lengths = [n for p in python_files(folder) for _, n in functions(p.read_text(encoding="utf-8"))]
    assert not lengths or p90(lengths) <= P90


def test_planted_excesses_are_caught():
    """Wrong implementations: bounds that nothing can exceed, a p90 that takes the median."""
    body = "\n".join(["def f():", *["    x = 1"] * FUNCTION])
    assert too_long({"a.py": (body, 300)}) == {"a.py:f": FUNCTION + 1}
    assert too_long({"a.cu": ("\n" * 401, NATIVE)}) == {"a.cu": 401}
    assert p90([1] * 80 + [100] * 20) == 100
    assert p90([1] * 95 + [100] * 5) == 1
    assert {"kernels/token_logp.py", "csrc/cpu/vec.h", "fastrl/ops.py"} <= repository().keys()
