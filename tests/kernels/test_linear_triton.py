"""linear's Triton kernel in the interpreter, which multiplies bf16 wrongly: float32 and float16 here, bf16 on
a GPU.
"""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.nn.functional import linear as torch_linear

from fastrl import ops

triton_linear = pytest.importorskip("fastrl.kernels._triton.linear")
DTYPES = [torch.float32, torch.float16]


def run(x, weight, bias, out=None):
    b = weight.new_empty(0) if bias is None else bias
    return triton_linear.forward(x, weight, b) if out is None else triton_linear.into(out, x, weight, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, N, K", [(1, 1, 1), (3, 7, 33), (130, 140, 70), (700, 5, 20)])
def test_as_near_to_float64_as_torch(T, N, K, dtype):
    """Wrong: tiles of a group that are counted by N (700 rows: two groups of fp32 tiles); tails of rows,
    columns or K.
    """
    x, weight, bias = torch.randn(T, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    for b in (bias, None):
        truth = torch_linear(x.double(), weight.double(), None if b is None else b.double())
        within_budget(run(x, weight, b), torch_linear(x, weight, b), truth)
    wide = run(x, weight, bias, torch.empty(T, N + 3)[:, :N])
    assert wide.dtype == torch.float32
    within_budget(
        wide,
        torch_linear(x.float(), weight.float(), bias.float()),
        torch_linear(x.double(), weight.double(), bias.double()),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_company(dtype):
    """Wrong: a row stride of K assumed; a tail of rows that reads another's.  Of integers, whose sums the
    interpreter's BLAS gets right in any order: whether the bits of other numbers are a row's own is tested on
    a GPU.
    """
    x, weight, bias = (torch.randint(-8, 9, s).to(dtype) for s in ((200, 70), (30, 70), (30,)))
    strided = torch.zeros(200, 75, dtype=dtype)
    strided[:, 3:73] = x
    want = run(x, weight, bias)
    for rows in ([0], [199], [7, 3, 150], list(range(64)), list(range(61, 200))):
        assert torch.equal(run(x[rows], weight, bias), want[rows])
    assert torch.equal(run(strided[:, 3:73], weight, bias), want)
    with ops.exact(), ops.use_backend("triton", "linear"):
        assert torch.equal(ops.linear(x, weight, bias), want)


def test_empty():
    """Wrong: a launch of no programs, which CUDA refuses; outputs that nobody wrote."""
    assert run(torch.empty(0, 4), torch.empty(3, 4), None).shape == (0, 3)
    assert torch.equal(
        run(torch.empty(2, 0), torch.empty(1, 0), torch.tensor([3.0])), torch.full((2, 1), 3.0)
    )
