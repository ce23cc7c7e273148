"""The sm_90 code of every Triton kernel, interpreted, on the oldest Triton that is supported and the newest.

Each case runs under two schedules of warps, "one at a time" and "random", with approximations as far off as
they may be: no race, no access out of bounds or misaligned, nothing read that nobody wrote, results within
their budget of float64, and the same bits under both.  "Interpreted" is not "run on a GPU".
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")

from ptx.cases.table import CASES, CUDA, LONG, LONG_CUDA
from ptx.server import NEWEST


@pytest.mark.parametrize("name", CASES)
def test_case(ask, name):
    """Wrong: what a schedule or an approximation that a GPU may choose brings to light."""
    assert ask(name)["complaints"] == []


def test_every_kernel_is_in_a_case(children):
    """Wrong: a new kernel that the gate never sees."""
    files = (Path(__file__).parents[2] / "kernels" / "_triton").glob("*.py")
    defined = {
        f"{p.stem}.{k}" for p in files for k in re.findall(r"^def (\w+)_kernel\(", p.read_text(), re.M)
    }
    assert defined and defined <= set(children[NEWEST].ask("kernels")["kernels"])


@pytest.mark.ptx
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LONG)
def test_long_case(ask, name):
    assert ask(name)["complaints"] == []


def judge_cuda(children, name):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: csrc/cuda is not compiled")
    assert children[NEWEST].ask(name)["complaints"] == []


@pytest.mark.parametrize("name", CUDA)
def test_case_of_csrc(children, name):
    """The same for csrc/cuda, launched by its own host code."""
    judge_cuda(children, name)


@pytest.mark.ptx
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LONG_CUDA)
def test_long_case_of_csrc(children, name):
    judge_cuda(children, name)
