"""linear_logp against materialised float64 logits."""

from __future__ import annotations

import pytest
import torch
from support import within_budget
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fastrl import ops
from fastrl.kernels.linear_logp import (
    backward_chunks,
    backward_linear_op,
    forward_chunks,
    forward_linear_op,
    reference,
)

TINY = 64  # bytes of logits: one or two rows a chunk


def arguments(T=9, D=6, V=11, dtype=torch.float64):
    torch.manual_seed(T)
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64).to(dtype).requires_grad_() for s in ((T, D), (V, D), (V,))
    )
    return hidden, weight, bias, torch.randint(V, (T,)), torch.rand(T, dtype=torch.float64).add(0.5).to(dtype)


def test_gradcheck_with_bias_temperature_and_entropy_over_chunks():
    hidden, weight, bias, y, tau = arguments()

    def op(hidden, weight, bias):
        return ops.linear_logp(
            hidden, weight, y, bias=bias, temperature=tau, entropy=True, logits_bytes=TINY
        )[:2]

    assert torch.autograd.gradcheck(op, (hidden, weight, bias))
    for ours, true in zip(op(hidden, weight, bias), reference(hidden, weight, y, bias, tau), strict=True):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, D, V", [(32, 16, 1000), (48, 64, 5000)])
def test_value_and_gradient_within_the_budget_of_pytorch(T, D, V, dtype):
    """In chunks of 16 rows: of three, MKL's own product of float32 is twice as far from float64 as that of
    all rows.
    """
    hidden, weight, _, y, _ = arguments(T, D, V, dtype)
    plain = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    true = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    up = torch.randn(T)
    ours = ops.linear_logp(hidden, weight, y, entropy=True, logits_bytes=16 * V * 4)
    logp, entropy = reference(*true, y, None, torch.ones(T))
    log_p = (plain[0] @ plain[1].T).float().log_softmax(-1)
    theirs, h = log_p.gather(1, y[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    (ours.logp @ up + ours.entropy.sum()).backward()
    (logp @ up.double() + entropy.sum()).backward()
    (theirs @ up + h.sum()).backward()
    within_budget(ours.logp, theirs, logp)
    assert (ours.logp - logp).abs().max() <= 1e-3 and (ours.logp - logp).abs().mean() <= 1e-4
    for a, b, c in zip((hidden, weight), plain, true, strict=True):
        within_budget(a.grad, b.grad, c.grad)


def test_opcheck_and_fullgraph():
    hidden, weight, bias, y, tau = arguments()
    call = (hidden, weight, bias, y, tau, True, torch.float64, 2)
    opcheck(forward_linear_op, call)
    logp, h, m, log_s = (x.detach() for x in forward_linear_op(*call))
    opcheck(
        backward_linear_op,
        (
            logp,
            h,
            hidden.detach(),
            weight.detach(),
            bias.detach(),
            y,
            tau,
            h,
            m,
            log_s,
            torch.float64,
            2,
            [True] * 3,
        ),
    )
    compiled = torch.compile(
        lambda x: ops.linear_logp(x, weight, y).logp, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(hidden), ops.linear_logp(hidden, weight, y).logp)


def test_chunks_do_not_change_a_bit_of_the_value():
    hidden, weight, _, y, _ = arguments(33, 8, 100, torch.float32)
    a, b = (ops.linear_logp(hidden, weight, y, logits_bytes=n).logp for n in (1, 1 << 20))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rows_without_an_upstream_gradient_leave_the_backward():
    """Wrong implementations: a row that only the entropy's gradient reaches is dropped; rows written where
    they are counted.
    """
    hidden, weight, bias, y, tau = (x.detach() for x in arguments(13))
    up, up_h = torch.randn(2, 13, dtype=torch.float64)
    up[::2] = 0
    up_h[::3] = 0  # rows 0, 6 and 12 have neither
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, h = reference(leaves[0], leaves[1], y, leaves[2], tau)
    true = torch.autograd.grad(logp @ up + h @ up_h, leaves)
    _, h, m, log_s = forward_chunks(hidden, weight, bias, y, tau, True, torch.float64, 4)
    with FlopCounterMode(display=False) as counter:
        grads = backward_chunks(
            up, up_h, hidden, weight, bias, y, tau, h, m, log_s, torch.float64, 4, [True] * 3
        )
    for ours, theirs in zip(grads, true, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counter.get_total_flops() == 6 * 10 * 6 * 11


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_costs_no_product(frozen):
    hidden, weight, _, y, tau = (x.detach() for x in arguments(9))
    _, h, m, log_s = forward_chunks(hidden, weight, weight[:0, 0], y, tau, False, torch.float64, 4)
    parts = (torch.ones_like(m), h, hidden, weight, weight[:0, 0], y, tau, h, m, log_s, torch.float64, 4)
    both = backward_chunks(*parts, [True, True, False])
    wanted = [frozen != 0, frozen != 1, False]
    with FlopCounterMode(display=False) as counter:
        grads = backward_chunks(*parts, wanted)
    assert counter.get_total_flops() == 4 * 9 * 6 * 11
    assert not grads[frozen].numel()
    assert torch.equal(grads[1 - frozen], both[1 - frozen])
    leaves = [x.clone().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=False)]
    ops.linear_logp(*leaves, y, temperature=tau).logp.sum().backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, both[1 - frozen])


def test_no_tokens():
    hidden, weight, _, y, _ = arguments(0)
    out = ops.linear_logp(hidden, weight, y, entropy=True)
    out.logp.sum().backward()
    assert out.logp.shape == (0,) and (weight.grad == 0).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"weight": torch.zeros(11, 5, dtype=torch.float64)},
            ValueError,
            r"weight: expected shape \(V, D=6\), got \(11, 5\)",
        ),
        ({"weight": torch.zeros(11, 6)}, TypeError, "weight: expected dtype float64, got float32"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(V=11\), got \(3,\)"),
        (
            {"logits_dtype": torch.int32},
            TypeError,
            "logits_dtype: expected float32 or hidden's own torch.float64",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    hidden, weight, _, y, _ = arguments()
    call = {"hidden": hidden, "weight": weight, "target": y} | change
    with pytest.raises(error, match=message):
        ops.linear_logp(**call)


def test_lse_is_that_of_the_logits():
    """Wrong: m alone, or log s alone."""
    hidden, weight, bias = torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)
    target = torch.zeros(6, dtype=torch.int64)
    right = (hidden.double() @ weight.double().T + bias.double()).logsumexp(-1)
    found = ops.linear_logp(hidden, weight, target, bias=bias).lse
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    loss = ops.linear_loss(hidden, weight, target, lambda p, h, r: -p.sum(), bias=bias)
    torch.testing.assert_close(loss[1].lse.double(), right, rtol=1e-5, atol=1e-5)
