"""Every Triton launch says whether products and sums are fused: the default decides bits, and Triton changes
it.

The sources are read, so that a kernel that no test launches counts too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastrl.kernels._launch import launch_options

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "kernels/_triton").glob("*.py"))
FUSION = "enable_fp_fusion"


def silent(source: str) -> list[int]:
    """Lines of launches and of options that leave fusion to Triton's default."""
    return sorted({node.lineno for node in ast.walk(ast.parse(source)) if leaves_out(node)})


def leaves_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
        return "num_warps" in names and FUSION not in names
    if not isinstance(node, ast.Call) or is_named(node.func, "launch_options"):
        return False

    names = {keyword.arg for keyword in node.keywords}  # None for **options
    launch = isinstance(node.func, ast.Subscript)
    return ("num_warps" in names or launch) and not names & {FUSION, None}


def is_named(function: ast.expr, name: str) -> bool:
    return isinstance(function, ast.Name) and function.id == name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_says_whether_it_fuses(path):
    assert silent(path.read_text()) == [], (
        f"{path.name}: these lines need `launch_options` of kernels/_launch.py"
    )


@pytest.mark.parametrize(
    "source",
    [
        'OPTIONS = {"num_warps": 4}',
        'OPTIONS = SHARED | {"num_warps": 4}',
        "kernel[(1,)](x, BLOCK=128)",
        "kernel[(1,)](x, num_warps=4)",
        "OPTIONS = dict(num_warps=4)",
    ],
)
def test_what_leaves_it_out_is_found(source):
    assert silent(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "OPTIONS = launch_options(num_warps=4)",
        'OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}',
        "kernel[(1,)](x, BLOCK=128, **OPTIONS)",
        "x[0] = f(y[1])",
    ],
)
def test_what_says_it_is_not(source):
    assert silent(source) == []


def test_the_shared_options_fuse():
    """Wrong: warps alone."""
    assert launch_options(num_warps=4, maxnreg=128) == {"num_warps": 4, FUSION: True, "maxnreg": 128}
