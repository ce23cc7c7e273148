"""linear_cross_entropy against torch's cross_entropy and materialised float64 logits, in every option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels import _head as _linear
from fastrl.kernels import token_logp as token_logp_module
from fastrl.kernels.linear_cross_entropy import REDUCTIONS, backward_op, forward_op, reference

T, D, V = 9, 6, 17
OPTIONS = [(0.0, None, 0.0), (0.1, None, 0.0), (0.0, 5.0, 0.0), (0.0, None, 0.01), (0.1, 5.0, 0.01)]


@pytest.fixture
def given():
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((T, D), (V, D), (V,))
    )
    target = torch.randint(V, (T,))
    target[2] = target[5] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("smoothing, softcap, z_loss", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradcheck(given, reduction, smoothing, softcap, z_loss):
    hidden, weight, bias, y = given

    def op(hidden, weight, bias):
        options = {
            "label_smoothing": smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
            "logits_bytes": 2 * V * 8,
        }
        return ops.linear_cross_entropy(hidden, weight, y, bias=bias, reduction=reduction, **options)

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    torch.testing.assert_close(
        op(hidden, weight, bias),
        reference(hidden, weight, y, bias, -100, reduction, smoothing, softcap or 0.0, z_loss),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_torchs_cross_entropy(given, reduction):
    hidden, weight, bias, y = given
    for smoothing in (0.0, 0.1):
        ours = ops.linear_cross_entropy(
            hidden, weight, y, bias=bias, reduction=reduction, label_smoothing=smoothing
        )
        torch.testing.assert_close(
            ours, F.cross_entropy(hidden @ weight.T + bias, y, reduction=reduction, label_smoothing=smoothing)
        )


def test_no_reduction_uses_every_tokens_own_upstream_gradient(given):
    """A known bug elsewhere: all gradients multiplied by the first token's upstream gradient."""
    hidden, weight, _, y = given
    up = torch.randn(T, dtype=torch.float64)
    ours = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, y, reduction="none") @ up, hidden)[0]
    true = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, y, reduction="none") @ up, hidden)[0]
    torch.testing.assert_close(ours, true)
    assert not torch.allclose(ours, true * up[0] / up[:, None])


def test_golden_label_smoothing():
    z = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64)
    hidden = z.clone().requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, torch.tensor([1]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(1.490190, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(
        hidden.grad[0],
        torch.tensor([0.6189, -0.6881, 0.0621, 0.0071], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )


def test_the_target_column_keeps_its_digits_when_the_model_is_sure():
    """p near 1: rounding p to bfloat16 before subtracting 1 loses the whole gradient of the target column."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    ops.linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    p = torch.sigmoid(torch.tensor(7.0, dtype=torch.float64))
    assert hidden.grad[0, 0].item() == pytest.approx(7 * (p - 1).item(), rel=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_budget_of_pytorch(dtype):
    torch.manual_seed(1)
    hidden, weight = (torch.randn(*s).to(dtype).requires_grad_() for s in ((32, 16), (5000, 16)))
    y = torch.randint(5000, (32,))
    plain, true = (
        [x.detach().to(t or dtype).clone().requires_grad_() for x in (hidden, weight)]
        for t in (None, torch.float64)
    )
    ours = ops.linear_cross_entropy(hidden, weight, y)
    theirs, exact = (
        F.cross_entropy((plain[0] @ plain[1].T).float(), y),
        F.cross_entropy(true[0] @ true[1].T, y),
    )
    for loss in (ours, theirs, exact):
        loss.backward()
    within_budget(ours, theirs, exact)
    for a, b, c in zip((hidden, weight), plain, true, strict=True):
        within_budget(a.grad, b.grad, c.grad)


def test_opcheck(given):
    hidden, weight, bias, y = given
    for reduction in REDUCTIONS:
        opcheck(
            forward_op,
            (
                hidden,
                weight,
                bias,
                y,
                None,
                reduction,
                [reduction != "none"] * 3,
                -100,
                0.1,
                5.0,
                0.01,
                torch.float64,
                4,
            ),
        )
    plain = [x.detach() for x in (hidden, weight, bias)]
    opcheck(
        backward_op,
        (
            torch.randn(T, dtype=torch.float64),
            *plain,
            y,
            None,
            [True] * 3,
            -100,
            0.1,
            5.0,
            0.01,
            torch.float64,
            4,
        ),
    )


def test_a_frozen_head_costs_no_product(given, monkeypatch):
    """Wrong implementation: the gradient of a weight that requires none is computed and thrown away."""
    hidden, weight, _, y = given

    def forbidden(*_):
        raise AssertionError("a product for the weight's gradient")

    monkeypatch.setattr(_linear, "add_weight_grad", forbidden)
    for reduction in REDUCTIONS:
        loss = ops.linear_cross_entropy(hidden, weight.detach(), y, reduction=reduction).sum()
        true = F.cross_entropy(hidden @ weight.detach().T, y, reduction=reduction).sum()
        for ours, theirs in zip(
            torch.autograd.grad(loss, hidden), torch.autograd.grad(true, hidden), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0}], ids=["plain", "options"])
def test_rows_given_are_rows_found(given, reduction, options):
    """Wrong: a mean over all T rows; a gradient at a row that is not in the mask."""
    hidden, weight, bias, y = given
    live = y != -100
    results = []
    for arguments in (
        {},
        {"mask": live, "ignore_index": 0},
        {"mask": live.nonzero().squeeze(1), "ignore_index": 0},
    ):
        loss = ops.linear_cross_entropy(
            hidden, weight, y, bias=bias, reduction=reduction, **options, **arguments
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))))
    assert 0 < live.sum() < T
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    with pytest.raises(ValueError, match=rf"mask: expected shape \(T={T}\), got"):
        ops.linear_cross_entropy(hidden, weight, y, mask=live[:-1])


def test_without_options_the_rows_are_token_logps(monkeypatch):
    """Wrong: a CPU user of the plain form who gets eager rows, when there are compiled ones."""
    hidden, weight, y = torch.randn(4, 8), torch.randn(30, 8, requires_grad=True), torch.randint(30, (4,))
    called = []
    real = _backend.pick
    monkeypatch.setattr(
        token_logp_module, "pick", lambda op, x, part: called.append((op, part)) or real(op, x, part)
    )
    ops.linear_cross_entropy(hidden, weight, y).backward()
    assert called == [("token_logp", "fused_into")]
    called.clear()
    ops.linear_cross_entropy(hidden, weight, y, reduction="none")
    assert called == [("token_logp", "forward")]


def test_everything_ignored():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    nothing = torch.full((3,), -100)
    assert ops.linear_cross_entropy(hidden, weight, nothing).isnan()  # as in PyTorch: a mean over nothing
    total = ops.linear_cross_entropy(hidden, weight, nothing, reduction="sum")
    total.backward()
    assert total == 0 and (hidden.grad == 0).all()


def test_bad_arguments_are_named():
    hidden, weight, y = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    for change, message in (
        ({"reduction": "avg"}, "reduction: expected one of 'mean', 'sum', 'none'; got 'avg'"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"softcap": 0.0}, "softcap: expected None or a positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_cross_entropy(hidden, weight, y, **change)
    bad = torch.tensor([0, 7, 1])
    loss = ops.linear_cross_entropy(hidden, weight, bad, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
