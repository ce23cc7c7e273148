"""swiglu's Triton kernels under the interpreter, through the op, against float64.  It shows values, not
races: those need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import ULP, within_budget
from torch.library import opcheck
from torch.nn.functional import silu

from fastrl import ops
from fastrl.kernels.swiglu import backward_op, forward_op

kernels = pytest.importorskip(
    "fastrl.kernels._triton.swiglu", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "swiglu"):
        yield


def plain(x, up):
    """By autograd, in the dtype of `x`."""
    leaf = x.clone().requires_grad_()
    gate, factor = leaf.chunk(2, -1)
    y = silu(gate) * factor
    return y, torch.autograd.grad(y, leaf, up)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, F", [(1, 1), (7, 31), (3, 1500), (2, 2048)])
def test_values_and_gradients(T, F, dtype):
    """Wrong: up first; a tail of columns that reads the other half (31, 1500); silu rounded before the
    product.
    """
    x, up = (3 * torch.randn(T, 2 * F)).to(dtype), torch.randn(T, F).to(dtype)
    ours, exact = (forward_op(x), backward_op(up, x)), plain(x.double(), up.double())
    for mine, its, right in zip(ours, plain(x, up), exact, strict=True):
        if dtype == torch.bfloat16:  # the interpreter truncates
            assert (mine.double() - right).abs().max() <= ULP[dtype] * right.abs().max()
        else:
            within_budget(mine, its, right)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # which is what is tested
def test_large_gates_stay_finite():
    """Wrong: exp of a large gate over itself; 0 times infinity in the derivative."""
    x = torch.tensor([[-1e4, 1e4, -88.0, 2.0, 2.0, 2.0]])
    assert torch.equal(forward_op(x)[:, :2], torch.tensor([[0.0, 2e4]]))
    assert backward_op(torch.ones(1, 3), x).isfinite().all()
    assert forward_op(torch.tensor([[torch.nan, 1.0]])).isnan().all()


def test_rows_that_are_not_contiguous():
    """Wrong: a row stride of 2F assumed, or a column stride of 1; an upstream gradient of stride 0."""
    x, up = torch.randn(5, 24), torch.randn(5, 12)
    wide = torch.zeros(5, 40)
    wide[:, 3:27] = x
    for view in (x.T.contiguous().T, wide[:, 3:27]):
        assert torch.equal(forward_op(view), forward_op(x))
        assert torch.equal(backward_op(up, view), backward_op(up, x))
    same = up[:1].expand(5, 12)
    assert torch.equal(backward_op(same, x), backward_op(same.clone(), x))


def test_no_rows():
    assert forward_op(torch.empty(0, 8)).shape == (0, 4) and forward_op(torch.empty(3, 0)).shape == (3, 0)
    assert backward_op(torch.empty(0, 4), torch.empty(0, 8)).shape == (0, 8)


def test_more_than_2_31_elements():
    """Wrong: row offsets in int32, which wrap at the third row.  The pages between the rows are never
    touched.
    """
    stride = 2**30
    rows = torch.empty(2 * stride + 40, dtype=torch.bfloat16).as_strided((3, 40), (stride, 1))
    x, up = torch.randn(3, 40).bfloat16(), torch.randn(3, 20).bfloat16()
    rows.copy_(x)
    assert torch.equal(forward_op(rows), forward_op(x))
    assert torch.equal(backward_op(up, rows), backward_op(up, x))


def test_a_launch_of_70000_rows(monkeypatch):
    """Wrong: rows on the grid's second axis, which ends at 65,535."""

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append(grid)

    grids = []
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    x = torch.zeros(70000, 10)
    backward_op(forward_op(x), x)
    assert grids == [(70000,), (70000,)]


def test_opcheck_and_compile():
    """Wrong: an op that torch.compile looks into."""
    x = torch.randn(3, 8)
    opcheck(forward_op, (x.clone().requires_grad_(),))
    opcheck(backward_op, (torch.randn(3, 4), x))
    assert torch.equal(torch.compile(ops.swiglu, fullgraph=True, backend="aot_eager")(x), ops.swiglu(x))
