"""swiglu against float64, and which half is the gate."""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.library import opcheck
from torch.nn.functional import silu

from fastrl import ops
from fastrl.kernels.swiglu import backward_op, forward_op


def test_golden_values():
    """Wrong implementation: up first, gate second."""
    y = ops.swiglu(torch.tensor([[1.0, -2.0, 3.0, 5.0]], dtype=torch.float64))
    torch.testing.assert_close(
        y, torch.tensor([[2.1931757359, -1.1920292202]], dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradient_within_the_budget_of_pytorch(dtype):
    x, up = (3 * torch.randn(17, 62)).to(dtype), torch.randn(17, 31).to(dtype)
    results = []
    for cast, fn in ((dtype, ops.swiglu), (dtype, plain), (torch.float64, plain)):
        leaf = x.detach().to(cast).requires_grad_()
        y = fn(leaf)
        results.append((y, torch.autograd.grad(y, leaf, up.to(cast))[0]))
    for ours, theirs, exact in zip(*results, strict=True):
        within_budget(ours, theirs, exact)


def plain(x):
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def test_bfloat16_is_computed_in_float32():
    """Wrong implementation: silu rounded to bfloat16 before the product."""
    x = torch.randn(64, 64).bfloat16()
    assert torch.equal(ops.swiglu(x), plain(x.float()).bfloat16())
    assert not torch.equal(plain(x), plain(x.float()).bfloat16())


def test_gradcheck():
    """Wrong implementation: a derivative of silu that forgets g s (1 - s)."""
    assert torch.autograd.gradcheck(ops.swiglu, torch.randn(3, 10, dtype=torch.float64, requires_grad=True))


def test_large_gates_stay_finite():
    x = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], requires_grad=True)
    y = ops.swiglu(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([[0.0, 2e4]]))
    assert torch.equal(x.grad, torch.tensor([[0.0, 2.0, 0.0, 1e4]]))


def test_empty_and_noncontiguous():
    assert ops.swiglu(torch.empty(0, 8)).shape == (0, 4)
    x = torch.randn(8, 5).t().requires_grad_()
    y = ops.swiglu(x)
    assert torch.equal(y, ops.swiglu(x.contiguous()))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_opcheck():
    x = torch.randn(3, 8, requires_grad=True)
    opcheck(forward_op, (x,))
    opcheck(backward_op, (torch.randn(3, 4), x.detach()))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="gate_up: expected an even number of columns"):
        ops.swiglu(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gate_up: expected shape \(T, 2F\), got \(4,\)"):
        ops.swiglu(torch.ones(4))
