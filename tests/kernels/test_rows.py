"""Rows by distinct indices: values and gradients of torch's own indexing, and a setting that is put back."""

from __future__ import annotations

import pytest
import torch
from host_waits import FakeCuda

from fastrl.kernels._rows import in_any_order, put_rows, spread_rows, take_rows

ROWS = torch.tensor([4, 0, 3])


def test_values_are_those_of_indexing():
    x, out = torch.randn(6, 2), torch.zeros(6, 2)
    assert torch.equal(take_rows(x, ROWS), x[ROWS])
    put_rows(out, ROWS, x[:3])
    want = torch.zeros(6, 2)
    want[ROWS] = x[:3]
    assert torch.equal(out, want) and torch.equal(spread_rows(x[:3], ROWS, 6), want)
    put_rows(out, slice(1, 3), x[:2])
    assert torch.equal(out[1:3], x[:2])


def test_gradients():
    """Wrong implementations: the gradient at the row's place in the other array; none for rows left out."""
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    few = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, ROWS), x)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, ROWS, 6), few)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, none), x)


@pytest.mark.parametrize("warn_only", [True, False])
def test_deterministic_mode_is_off_for_the_call_alone(warn_only):
    """Wrong implementations: it stays off after an error; warn_only lost; switched off on a CPU, too."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    with FakeCuda() as cuda:
        x = torch.zeros(6, 2, device="cuda")
        with pytest.raises(KeyError), in_any_order(x):
            assert not torch.are_deterministic_algorithms_enabled()
            raise KeyError
        with in_any_order(torch.zeros(2)):
            assert torch.are_deterministic_algorithms_enabled()
        put_rows(x, torch.arange(3, device="cuda"), x[:3] + 1)
        assert cuda.sorts == []
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
