"""rms_norm's Triton kernels under the interpreter, through the op, against float64.  It shows values, not
races: those need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import ULP, within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels.rms_norm import add_backward_op, add_op, backward_op, forward_op

kernels = pytest.importorskip(
    "fastrl.kernels._triton.rms_norm", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "rms_norm"):
        yield


def case(T, D, dtype=torch.float32):
    """x, residual, weight, and the gradients that arrive at y and at x + residual."""
    x, residual, up, up_h = (torch.randn(T, D).to(dtype) for _ in range(4))
    return x, residual, (1 + 0.3 * torch.randn(D)).to(dtype), up, up_h


def ours(x, residual, weight, up, up_h):
    """y, h, the gradient of x (which is the residual's), dw; and without a residual y, dx, dw."""
    y, h, r = add_op(x, residual, weight, 1e-6)
    alone, r_alone = forward_op(x, weight, 1e-6)
    return y, h, *add_backward_op(up, up_h, h, weight, r), alone, *backward_op(up, x, weight, r_alone)


def plain(x, residual, weight, up, up_h):
    """The same by autograd, in Hugging Face's order of rounding."""
    out = []
    for other in (residual, None):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        h = a if other is None else a + other
        wide = h if h.dtype == torch.float64 else h.float()
        y = w * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(h.dtype)
        total = (y * up).sum() + ((h * up_h).sum() if other is not None else 0)
        grads = torch.autograd.grad(total, (a, w))
        out += [y, *([h] if other is not None else []), *grads]
    return out


def judge(args):
    exact = plain(*(x.double() for x in args))
    for mine, its, right in zip(ours(*args), plain(*args), exact, strict=True):
        if mine.dtype == torch.bfloat16:  # the interpreter truncates each of up to three roundings
            assert (mine.double() - right).abs().max() <= 4 * ULP[mine.dtype] * right.abs().max()
        else:
            within_budget(mine, its, right)


SHORT = [(1, 3), (7, 64), (9, 513), (3, 1024), (70, 96)]
WALKED = (2, 9000)
NARROW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        *((shape, dtype) for shape in SHORT for dtype in (torch.float32, *NARROW)),
        (WALKED, torch.float32),
        *(pytest.param(WALKED, dtype, marks=pytest.mark.slow) for dtype in NARROW),
    ],
    ids=str,
)
def test_values_and_gradients(shape, dtype):
    """Wrong: a tail of columns or rows that is counted or dropped; a mean over the block; walked rows (9000)
    whose second half forgets the sum; rows that two programs add to the weight's gradient (70: two turns of
    the loop).
    """
    judge(case(*shape, dtype))


def test_rounds_where_hugging_face_rounds():
    """Wrong: one rounding at the very end; a sum that is normalised before it is rounded."""
    x, residual, weight, *_ = case(64, 96, torch.float16)
    y, h, _ = add_op(x, residual, weight, 1e-6)
    assert torch.equal(h, x + residual)
    with ops.use_backend("reference", "rms_norm"):
        assert torch.equal(y, forward_op(h, weight, 1e-6)[0])


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_weight_of_another_dtype(weights):
    """Wrong: a weight's gradient in the dtype of the activations."""
    x, _, weight, up, _ = case(9, 40, torch.float16)
    results = []
    for name in ("triton", "reference"):
        with ops.use_backend(name, "rms_norm"):
            w = weight.to(weights).requires_grad_()
            y = ops.rms_norm(x, w)
            results.append((y, *torch.autograd.grad(y, w, up)))
    assert [t.dtype for t in results[0]] == [torch.float16, weights]
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, atol=5e-3, rtol=2**-7)


def test_rows_that_are_not_contiguous():
    """Wrong: a row stride of D assumed, or a column stride of 1; an upstream gradient of stride 0."""
    x, residual, weight, up, up_h = case(6, 48)
    want = ours(x, residual, weight, up, up_h)
    wide = torch.zeros(6, 80)
    wide[:, :48] = x
    for view in (x.T.contiguous().T, wide[:, :48]):
        assert all(
            torch.equal(a, b) for a, b in zip(ours(view, residual, weight, up, up_h), want, strict=True)
        )
    same = up[:1].expand(6, 48)
    want = ours(x, residual, weight, same.clone(), same.clone())
    assert all(torch.equal(a, b) for a, b in zip(ours(x, residual, weight, same, same), want, strict=True))


def test_no_rows_and_no_columns():
    """Wrong: a launch of an empty grid; a weight's gradient that is left as it was allocated."""
    for T, D in ((0, 8), (3, 0), (0, 9000)):
        *_, dx, dw = ours(*case(T, D))
        assert dx.shape == (T, D) and torch.equal(dw, torch.zeros(D))


def test_nan_and_infinity_stay_in_their_row():
    """Wrong: a weight's gradient that hides them, a neighbour that shares the program and catches them."""
    x, residual, weight, up, up_h = case(8, 64)
    x[2, 5] = torch.nan
    y, _, dx, dw, *_ = ours(x, residual, weight, up, up_h)
    assert y.isnan().any(1).tolist() == dx.isnan().any(1).tolist() == [i == 2 for i in range(8)]
    assert dw[5].isnan()


def test_large_and_tiny_rows():
    """Wrong: an eps that is left out (all zeros), a reciprocal root without its digits."""
    x, residual, weight, up, up_h = case(4, 100)
    x[0] = residual[0] = 0
    x[1:3] *= torch.tensor([1e-12, 1e12])[:, None]
    residual[1:3] = 0
    y, _, dx, *_ = ours(x, residual, weight, up, torch.zeros_like(up))
    assert (y[0] == 0).all() and dx.isfinite().all()
    judge((x, residual, weight, up, up_h))


def test_more_than_2_31_elements():
    """Wrong: row offsets in int32, which wrap at the third row.  The pages between the rows are never
    touched.
    """
    stride, D = 2**30, 40
    rows = torch.empty(2 * stride + D, dtype=torch.bfloat16).as_strided((3, D), (stride, 1))
    args = case(3, D, torch.bfloat16)
    rows.copy_(args[0])
    assert all(torch.equal(a, b) for a, b in zip(ours(rows, *args[1:]), ours(*args), strict=True))


def test_two_runs_give_the_same_bits():
    args = case(70, 130)
    assert all(torch.equal(a, b) for a, b in zip(ours(*args), ours(*args), strict=True))


def test_a_launch_of_70000_rows(monkeypatch):
    """Wrong: rows on the grid's second axis, which ends at 65,535; a backward with a program for each row."""

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **options: grids.append((*grid, options["BLOCK"]))

    grids = []
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    x, w = torch.zeros(70000, 64), torch.ones(64)
    backward_op(x, x, w, forward_op(x, w, 1e-6)[1])
    assert grids == [(4375, 64), (8, 64)]


def test_opcheck():
    x, residual, weight, up, up_h = case(3, 8)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    opcheck(forward_op, (leaves[0], leaves[2], 1e-6))
    opcheck(add_op, (*leaves, 1e-6))
    r = torch.rand(3, 1) + 0.5
    opcheck(backward_op, (up, x, weight, r))
    opcheck(add_backward_op, (up, up_h, x, weight, r))


def test_under_compile():
    """Wrong: an op that torch.compile looks into."""
    x, residual, weight, *_ = case(4, 30)
    compiled = torch.compile(
        lambda x, r, w: ops.rms_norm(x, w, residual=r), fullgraph=True, backend="aot_eager"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            compiled(x, residual, weight), ops.rms_norm(x, weight, residual=residual), strict=True
        )
    )
