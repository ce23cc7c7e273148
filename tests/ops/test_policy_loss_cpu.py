"""policy_loss's C++ kernel on every instruction set this processor has, against float64; each test names what it catches."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from policy import SWITCHES, case, judge, kls, run, variant

from fastrl import ops
from fastrl.kernels._backend import extension
from fastrl.kernels.policy_loss import KLS, METRICS, RATIOS, SURROGATES, policy_loss, reference

C = extension()
needs_c = pytest.mark.skipif(C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    if C is None:
        pytest.skip("fastrl._C is not built")
    if request.param not in C.cpu_isas():
        pytest.skip(f"this processor has no {request.param}: compiled, not run")
    monkeypatch.setenv("FASTRL_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_every_row_with_every_kl_and_every_input(isa, name, ratio):
    """Wrong: rows numbered in another order than the tables; a correction on the KL term; a tail of 301 tokens dropped or read past."""
    given = case(301)
    for kl, switches in product(kls(), SWITCHES):
        judge("cpu", variant(given, name, ratio, kl, switches))
