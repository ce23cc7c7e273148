"""rms_norm against float64 and Hugging Face's order of rounding, alone and with the residual addition."""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels.rms_norm import add_op, backward_op, forward_op


def truth(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def hugging_face(x, weight, eps=1e-6):
    """LlamaRMSNorm: fp32 statistics, rounded before the weight."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def test_golden_values():
    """Wrong implementations: eps outside the root, the sum instead of the mean, a mean subtracted as
    LayerNorm does.
    """
    y = ops.rms_norm(
        torch.tensor([[3.0, 4.0]], dtype=torch.float64),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        eps=0.0,
    )
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 12.5**0.5)
    small = ops.rms_norm(
        torch.full((1, 4), 1e-3, dtype=torch.float64), torch.ones(4, dtype=torch.float64), eps=1e-6
    )
    torch.testing.assert_close(small, torch.full((1, 4), 0.5**0.5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, D", [(1, 1), (7, 64), (33, 513)])
def test_value_and_gradients_within_the_budget_of_pytorch(T, D, dtype):
    x, residual, up, up_h = (torch.randn(T, D).to(dtype) for _ in range(4))
    weight = (1 + 0.3 * torch.randn(D)).to(dtype)
    grads, values = {}, {}
    for name, cast, norm in (
        ("ours", dtype, None),
        ("theirs", dtype, hugging_face),
        ("truth", torch.float64, truth),
    ):
        leaves = [t.detach().to(cast).requires_grad_() for t in (x, residual, weight)]
        if norm is None:
            y, h = ops.rms_norm(leaves[0], leaves[2], residual=leaves[1])
        else:
            h = leaves[0] + leaves[1]
            y = norm(h, leaves[2])
        values[name] = (y, h)
        grads[name] = torch.autograd.grad((y * up.to(cast)).sum() + (h * up_h.to(cast)).sum(), leaves)
    for kind in (values, grads):
        for ours, theirs, exact in zip(*(kind[n] for n in ("ours", "theirs", "truth")), strict=True):
            within_budget(ours, theirs, exact)


def test_bfloat16_rounds_where_hugging_face_rounds():
    """Wrong implementations: one rounding at the very end, or statistics in bfloat16: sampler and
    transformers would differ.
    """
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight), hugging_face(x, weight))
    once = (truth(x.float(), weight.float())).bfloat16()
    assert not torch.equal(once, hugging_face(x, weight))


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(residual):
    """Wrong implementation: a backward that drops the mean of g n, or the gradient that arrives at x +
    residual.
    """
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (3, 5))]
    fn = (
        (lambda x, w, r: ops.rms_norm(x, w, residual=r)) if residual else (lambda x, w, r: ops.rms_norm(x, w))
    )
    assert torch.autograd.gradcheck(fn, leaves)


def test_the_sum_is_returned_not_the_input():
    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    y, h = ops.rms_norm(x, w, residual=r)
    assert torch.equal(h, x + r)
    assert torch.equal(y, ops.rms_norm(h, w))


def test_empty_noncontiguous_and_batched():
    w = torch.rand(8)
    assert ops.rms_norm(torch.empty(0, 8), w).shape == (0, 8)
    x = torch.randn(8, 6).t()
    assert torch.equal(ops.rms_norm(x, w), ops.rms_norm(x.contiguous(), w))
    b = torch.randn(2, 3, 8)
    assert torch.equal(ops.rms_norm(b, w)[1], ops.rms_norm(b[1], w))
    y, h = ops.rms_norm(b, w, residual=b)
    assert y.shape == h.shape == b.shape


def test_opcheck():
    x, w, r = (
        torch.randn(3, 8, requires_grad=True),
        torch.rand(8, requires_grad=True),
        torch.randn(3, 8, requires_grad=True),
    )
    opcheck(forward_op, (x, w, 1e-6))
    opcheck(add_op, (x, r, w, 1e-6))
    opcheck(backward_op, (torch.randn(3, 8), x.detach(), w.detach(), torch.rand(3, 1) + 0.5))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(2, 3), torch.ones(4)), ValueError, r"x: expected shape \(T, D=4\), got \(2, 3\)"),
        ((torch.ones(2, 2, 3), torch.ones(4)), ValueError, r"x: expected shape \(\.\.\., D=4\)"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(3)), TypeError, "x: expected dtype"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(*arguments)


def test_a_residual_of_another_type_is_refused():
    with pytest.raises(TypeError, match="residual: expected dtype bfloat16"):
        ops.rms_norm(torch.ones(2, 3).bfloat16(), torch.ones(3), residual=torch.ones(2, 3))
