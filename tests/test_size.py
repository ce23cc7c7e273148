"""Sizes and density: the tail is what makes a code base hard to read, so the tail is what is bounded.

Lines have at most 110 columns (ruff), files at most 400 lines, and nothing is packed past the formatter.  A
statement counts its own nodes of the syntax tree, without those of the statements inside it.  The exceptions
may only shrink: an entry that is no longer needed fails the test too.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastrl": 400, "kernels": 400, "bench": 400, "tests": 600}  # lines a Python file may have
FUNCTION, P90 = 60, 30  # lines: the longest function, and the length that nine of ten stay within
NATIVE = 400  # lines of a file in csrc
STATEMENT = 60  # nodes of the largest statement in fastrl/
DENSITY = 12.0  # nodes per line of code inside the functions of fastrl/, on average
LONGER: dict[str, int] = {}  # file, or file:function -> lines it has
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def python_files(folder: str) -> list[Path]:
    links = ("kernels", "bench") if folder == "fastrl" else ()
    files = sorted((ROOT / folder).rglob("*.py"))
    return [p for p in files if p.relative_to(ROOT / folder).parts[0] not in links]


def functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, methods and nested ones included.

    A signature with a line for each argument counts as one line: arguments are not what makes it long.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.body[0].lineno + 2


def is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, and more than a comment or a docstring."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if is_docstring(node):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return found


def own_nodes(statement: ast.stmt) -> int:
    """Nodes of a statement without those of the statements inside it."""
    count, stack = 0, [statement]
    while stack:
        node = stack.pop()
        count += 1
        stack += [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.stmt)]
    return count


def outermost(node: ast.AST) -> Iterator[ast.AST]:
    """Functions that are not inside another function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from outermost(child)


def density(texts: list[str]) -> float:
    """Nodes per line of code inside functions."""
    nodes = lines = 0
    for text in texts:
        code = code_lines(text)
        for function in outermost(ast.parse(text)):
            nodes += sum(1 for _ in ast.walk(function))
            lines += len(code & set(range(function.lineno, function.end_lineno + 1)))
    return nodes / max(lines, 1)


def large_statements(text: str) -> list[tuple[int, int]]:
    """(line, nodes) of every statement of a function that is too large; a module's table may be long."""
    inside = {s for f in outermost(ast.parse(text)) for s in ast.walk(f)}
    found = ((s.lineno, own_nodes(s)) for s in inside if isinstance(s, ast.stmt) and not is_docstring(s))
    return sorted((line, n) for line, n in found if n > STATEMENT)


def too_long(files: dict[str, tuple[str, int]]) -> dict[str, int]:
    """What exceeds its bound: file -> lines, file:function -> lines.

    `files` maps a path to its text and bound.
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


def test_no_statement_is_packed():
    texts = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in python_files("fastrl")}
    assert {name: found for name, text in texts.items() if (found := large_statements(text))} == {}


def test_lines_have_air():
    assert density([p.read_text(encoding="utf-8") for p in python_files("fastrl")]) <= DENSITY


def test_the_formatter_is_never_overruled():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert settings["line-length"] == 110
    overruled = "fmt: " + "skip"
    assert [name for name, (text, _) in repository().items() if overruled in text] == []


def test_planted_excesses_are_caught():
    """Wrong implementations: bounds that nothing can exceed, a p90 that takes the median."""
    body = "\n".join(["def f():", *["    x = 1"] * FUNCTION])
    assert too_long({"a.py": (body, 300)}) == {"a.py:f": FUNCTION + 1}
    assert too_long({"a.cu": ("\n" * 401, NATIVE)}) == {"a.cu": 401}
    assert p90([1] * 80 + [100] * 20) == 100
    assert p90([1] * 95 + [100] * 5) == 1
    assert {"kernels/token_logp.py", "csrc/cpu/vec.h", "fastrl/ops.py"} <= repository().keys()


def test_planted_density_is_caught():
    """Wrong implementations: nested statements counted twice, docstrings and comments as code."""
    packed = "def f():\n    return [" + ", ".join(f"g(x{i})" for i in range(30)) + "]"
    assert large_statements(packed) == [(2, 3 + 30 * 5)]
    assert large_statements("TABLE = [" + ", ".join(f"g(x{i})" for i in range(30)) + "]") == []
    nested = "def f():\n    if a:\n        " + "\n        ".join("b = c" for _ in range(40))
    assert large_statements(nested) == []
    plain = 'def f():\n    """A docstring."""\n\n    # a comment\n    return 1\n'
    assert (
        density([plain]) == density(["def f():\n    return 1\n"]) + 1
    )  # the docstring's own two nodes, less one
