"""rms_norm's C++ kernels against float64 on every instruction set this processor has.  Without fastrl._C:
skipped, visibly.
"""

from __future__ import annotations

import pytest
import torch
from support import within_budget

from fastrl.kernels._backend import backend, extension, use_backend
from fastrl.kernels.rms_norm import add_backward_op, add_op, backward_op, forward_op, rms_norm

C = extension()
ISAS = ("baseline", "avx2", "avx512")
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)


def case(T, D, dtype=torch.float32):
    """x, residual, weight, and the gradients that arrive at y and at x + residual."""
    x, residual, up, up_h = (torch.randn(T, D).to(dtype) for _ in range(4))
    return x, residual, (1 + 0.3 * torch.randn(D)).to(dtype), up, up_h


def run(name, x, residual, weight, up, up_h):
    """y, h, r, dx, dw with a residual; y, r, dx, dw without."""
    with use_backend(name, "rms_norm"):
        y, h, r = add_op(x, residual, weight, 1e-6)
        alone, r_alone = forward_op(x, weight, 1e-6)
        return (
            y,
            h,
            r,
            *add_backward_op(up, up_h, h, weight, r),
            alone,
            r_alone,
            *backward_op(up, x, weight, r_alone),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, D", [(1, 1), (5, 7), (33, 64), (70, 513), (3, 896), (2, 9000)])
def test_as_near_to_float64_as_the_reference(isa, T, D, dtype):
    """Wrong: a tail of columns that is dropped (7, 513) or a block boundary that is crossed (9000); rows of
    the second block (70) missing in the weight's gradient; a mean in bf16.
    """
    args = case(T, D, dtype)
    exact = run("reference", *(x.double() for x in args))
    for mine, its, right in zip(run("cpu", *args), run("reference", *args), exact, strict=True):
        assert mine.dtype == its.dtype
        if D > 1 or mine.shape != (T, D):  # a row of one has a gradient of nothing but cancellation
            within_budget(mine, its, right)


def test_bfloat16_rounds_where_the_reference_rounds(isa):
    """Wrong: one rounding at the end, truncation, a sum that is normalised before it is rounded."""
    x, residual, weight, *_ = case(64, 100, torch.bfloat16)
    ours, its = (run(n, x, residual, weight, x, x) for n in ("cpu", "reference"))
    assert torch.equal(ours[1], its[1])
    same = (ours[2] == its[2]).squeeze(1)  # r may differ in its last bit, which moves a rounding now and then
    assert same.sum() >= 32
    assert torch.equal(ours[0][same], its[0][same])


def test_nan_stays_nan_and_in_its_row(isa):
    """Wrong: a rounding that carries the bits of a NaN into infinity or over into the sign; a neighbour that
    catches it.
    """
    for dtype in (torch.float32, torch.bfloat16):
        x, *rest = case(5, 40, dtype)
        x[2, 39] = torch.nan
        x.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[2, 3] = (
            0x7FFF if dtype == torch.bfloat16 else 0x7FFFFFFF
        )
        y, h, r, dx, dw, *_ = run("cpu", x, *rest)
        assert h[2, [3, 39]].isnan().all() and y[2].isnan().all() and dx[2].isnan().all() and dw[39].isnan()
        assert all(t[[0, 1, 3, 4]].isfinite().all() for t in (y, h, r, dx))


def test_rows_of_zeros(isa):
    """Wrong: 1 / sqrt without eps."""
    zeros = torch.zeros(3, 20)
    out = run("cpu", zeros, zeros, torch.ones(20), torch.ones(3, 20), zeros)
    assert all(t.isfinite().all() for t in out) and (out[0] == 0).all()


def test_the_same_bits_for_every_thread_count(isa, threads):
    """Wrong: a weight's gradient summed in the order in which threads finish, or over as many parts as there
    are threads.
    """
    args = case(300, 257)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results += [run("cpu", *args), run("cpu", *args)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_c
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_weight_of_another_dtype(weights):
    """Wrong: the weight read as if it had the dtype of the activations; its gradient in theirs."""
    x, _, weight, up, _ = case(9, 40, torch.bfloat16)
    results = []
    for name in ("cpu", "reference"):
        with use_backend(name, "rms_norm"):
            w = weight.to(weights).requires_grad_()
            y = rms_norm(x, w)
            results.append((y, *torch.autograd.grad(y, w, up)))
    assert [t.dtype for t in results[0]] == [torch.bfloat16, weights]
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-2, rtol=2**-7)


@needs_c
def test_rows_that_are_not_contiguous():
    """Wrong: a row stride of D assumed, or a column stride of 1; an upstream gradient of stride 0."""
    x, residual, weight, up, up_h = case(6, 48)
    want = run("cpu", x, residual, weight, up, up_h)
    padded = torch.zeros(6, 80)
    padded[:, 3:51] = x
    for view in (x.T.contiguous().T, padded[:, 3:51]):
        assert all(
            torch.equal(a, b) for a, b in zip(run("cpu", view, residual, weight, up, up_h), want, strict=True)
        )
    same = up[:1].expand(6, 48)
    want = run("cpu", x, residual, weight, same.clone(), same.clone())
    assert all(
        torch.equal(a, b) for a, b in zip(run("cpu", x, residual, weight, same, same), want, strict=True)
    )


@needs_c
def test_offsets_beyond_2_to_the_31():
    """Wrong: a 32-bit row offset.  The pages between the rows are never touched."""
    rows = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 40), (2**30, 1))
    args = case(3, 40, torch.bfloat16)
    rows.copy_(args[0])
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", rows, *args[1:]), run("cpu", *args), strict=True))


@needs_c
def test_no_rows_and_no_columns():
    """Wrong: a weight's gradient that is left as it was allocated."""
    for T, D in ((0, 8), (3, 0)):
        y, h, r, dx, dw, *_ = run("cpu", *case(T, D))
        assert y.shape == h.shape == dx.shape == (T, D)
        assert r.shape == (T, 1)
        assert torch.equal(dw, torch.zeros(D))


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs."""
    assert backend("cpu")["rms_norm"] == "cpu"


@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"D": 0}, "D: expected at least 1, got 0"),
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"x": 0}, "y, r, x, weight: expected addresses, got 0"),
        ({"residual": 8}, "h: expected an address exactly where residual has one"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "y": 8,
        "h": 0,
        "r": 8,
        "x": 8,
        "x_stride": 4,
        "residual": 0,
        "residual_stride": 4,
        "code": 0,
        "weight": 8,
        "eps": 1e-6,
    }
    with pytest.raises(ValueError, match=message):
        C.rms_norm_forward_cpu(*(given | {"T": 1, "D": 4, "threads": 1} | changes).values())
