"""swiglu's C++ kernels against float64 on every instruction set this processor has.  Without fastrl._C:
skipped, visibly.
"""

from __future__ import annotations

import pytest
import torch
from support import within_budget

from fastrl.kernels._backend import backend, extension, use_backend
from fastrl.kernels.swiglu import backward_op, forward_op

C = extension()
ISAS = ("baseline", "avx2", "avx512")
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)


def run(name, x, up):
    with use_backend(name, "swiglu"):
        return forward_op(x), backward_op(up, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, F", [(1, 1), (5, 7), (33, 64), (9, 513), (2, 9000)])
def test_as_near_to_float64_as_the_reference(isa, T, F, dtype):
    """Wrong: up first; a tail of columns that reads the other half (7, 513); silu rounded to bf16 before the
    product.
    """
    x, up = (3 * torch.randn(T, 2 * F)).to(dtype), torch.randn(T, F).to(dtype)
    ours, its, exact = run("cpu", x, up), run("reference", x, up), run("reference", x.double(), up.double())
    for mine, like, right in zip(ours, its, exact, strict=True):
        assert mine.dtype == dtype
        within_budget(mine, like, right)


def test_large_gates_and_nan(isa):
    """Wrong: an exponential that overflows; one that is held, so that a closed gate of -1e4 lets 1e-34
    through; a NaN swallowed.
    """
    x = torch.tensor([[-1e4, 1e4, -88.0, torch.nan, 2.0, 2.0, 2.0, 2.0]])
    y, dx = run("cpu", x, torch.ones(1, 4))
    assert torch.equal(y[:, :3], torch.tensor([[0.0, 2e4, 0.0]])) and y[0, 3].isnan()
    assert dx[0, [0, 1, 2, 4, 5, 6]].isfinite().all() and dx[0, [3, 7]].isnan().all()


def test_the_same_bits_for_every_thread_count(isa):
    """Wrong: a vector that a thread's share cuts in two."""
    x, up = torch.randn(300, 2 * 101), torch.randn(300, 101)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run("cpu", x, up))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_c
def test_rows_that_are_not_contiguous_and_empty_input():
    """Wrong: a row stride of 2F assumed, or a column stride of 1; an upstream gradient of stride 0."""
    x, up = torch.randn(5, 24), torch.randn(5, 12)
    padded = torch.zeros(5, 40)
    padded[:, 3:27] = x
    want = run("cpu", x, up)
    for view in (x.T.contiguous().T, padded[:, 3:27]):
        assert all(torch.equal(a, b) for a, b in zip(run("cpu", view, up), want, strict=True))
    same = up[:1].expand(5, 12)
    assert torch.equal(run("cpu", x, same)[1], run("cpu", x, same.clone())[1])
    for T, F in ((0, 4), (3, 0)):
        y, dx = run("cpu", torch.empty(T, 2 * F), torch.empty(T, F))
        assert y.shape == (T, F) and dx.shape == (T, 2 * F)


@needs_c
def test_offsets_beyond_2_to_the_31():
    """Wrong: a 32-bit row offset.  The pages between the rows are never touched."""
    rows = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 40), (2**30, 1))
    x, up = torch.randn(3, 40).bfloat16(), torch.randn(3, 20).bfloat16()
    rows.copy_(x)
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", rows, up), run("cpu", x, up), strict=True))


@needs_c
def test_chosen_by_default_on_cpu_and_its_arguments_checked():
    """Wrong: a kernel that is built and never runs; an address of 0 that ends the process."""
    assert backend("cpu")["swiglu"] == "cpu"
    for change, message in (
        ((8, 8, 4, 2, 1, 2, 1), "code: expected 0"),
        ((0, 8, 4, 0, 1, 2, 1), "y, x: expected addresses"),
    ):
        with pytest.raises(ValueError, match=message):
            C.swiglu_forward_cpu(*change)
