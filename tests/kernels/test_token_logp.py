"""token_logp against float64, its golden values, and the wrong implementations it must not be."""

from __future__ import annotations

import math
import os

import pytest
import torch
from support import use, within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.bench.timing import peak_bytes
from fastrl.kernels.token_logp import backward_into_op, backward_op, forward_op, fused_op, narrow_view

SHAPES = [(1, 1), (5, 7), (3, 1000), (2, 50257)]


def truth(logits, target, temperature=1.0):
    """The formula once more, in float64, by autograd."""
    z = logits.detach().double().requires_grad_()
    log_p = (z / torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)).log_softmax(-1)
    entropy = -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0)).sum(-1)
    return z, log_p.gather(1, target[:, None]).squeeze(1), entropy


def test_golden_values():
    z = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1])
    out = ops.token_logp(z, y, entropy=True)
    torch.testing.assert_close(out.logp, torch.tensor([-1.440190], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy, torch.tensor([0.947537], dtype=torch.float64), atol=1e-6, rtol=0)
    dlogp, dentropy = (
        torch.autograd.grad(x.sum(), z, retain_graph=True)[0][0] for x in (out.logp, out.entropy)
    )
    torch.testing.assert_close(
        dlogp, torch.tensor([-0.6439, 0.7631, -0.0871, -0.0321], dtype=torch.float64), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        dentropy, torch.tensor([-0.3267, 0.1167, 0.1301, 0.0799], dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert ops.token_logp(z, y, temperature=0.7).logp.item() == pytest.approx(-1.699245, abs=1e-6)


def test_uniform_logits_give_log_V():
    out = ops.token_logp(torch.zeros(3, 7), torch.tensor([0, 3, 6]), entropy=True)
    torch.testing.assert_close(out.logp, torch.full((3,), -math.log(7)))
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, V", SHAPES)
def test_value_and_gradient_within_the_budget_of_pytorch(T, V, dtype):
    torch.manual_seed(V)
    logits = (3 * torch.randn(T, V)).to(dtype).requires_grad_()
    target, tau, up = torch.randint(V, (T,)), torch.rand(T) + 0.5, torch.randn(T)
    out = ops.token_logp(logits, target, temperature=tau, entropy=True)
    (out.logp @ up + out.entropy.sum()).backward()
    z, logp, entropy = truth(logits, target, tau)
    (logp @ up.double() + entropy.sum()).backward()
    plain = logits.detach().clone().requires_grad_()
    log_p = (plain.float() / tau[:, None]).log_softmax(-1)
    h = -(log_p.exp() * log_p).sum(-1)
    theirs = log_p.gather(1, target[:, None]).squeeze(1)
    (theirs @ up + h.sum()).backward()
    within_budget(out.logp, theirs, logp)
    within_budget(out.entropy, h, entropy)
    within_budget(logits.grad, plain.grad, z.grad)
    assert (out.logp - logp).abs().max() <= 1e-5


@pytest.mark.parametrize("offset", [1000.0, -1000.0, -200.0])
def test_offsets_cost_no_precision_unlike_target_minus_logsumexp(offset):
    """`z[target] - logsumexp(z)` in float32 misses 1e-5 here; and a running maximum that starts at 0
    underflows at -1000.
    """
    torch.manual_seed(0)
    logits = torch.randn(64, 1000) + offset
    target = torch.randint(1000, (64,))
    _, logp, _ = truth(logits, target)
    assert (ops.token_logp(logits, target).logp - logp).abs().max() <= 1e-5
    naive = logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(-1)
    assert abs(offset) < 500 or (naive - logp).abs().max() > 1e-5


def test_banned_tokens_leave_everything_finite():
    z = torch.randn(4, 9, dtype=torch.float64)
    z[:, 3:6] = -torch.inf
    z.requires_grad_()
    out = ops.token_logp(z, torch.tensor([0, 1, 2, 8]), entropy=True)
    (out.logp + out.entropy).sum().backward()
    _, logp, entropy = truth(z, torch.tensor([0, 1, 2, 8]))
    torch.testing.assert_close(out.logp, logp)
    torch.testing.assert_close(out.entropy, entropy)
    assert z.grad.isfinite().all() and (z.grad[:, 3:6] == 0).all()


def test_a_target_outside_the_vocabulary_is_nan_and_its_gradient_is_what_upstream_says():
    z = torch.randn(3, 5, requires_grad=True)
    out = ops.token_logp(z, torch.tensor([-100, 5, 2]))
    assert out.logp.isnan().tolist() == [True, True, False]
    torch.where(torch.tensor([False, False, True]), out.logp, 0).sum().backward()
    assert (z.grad[:2] == 0).all() and z.grad[2].abs().sum() > 0


def test_gradcheck():
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y, tau = torch.tensor([0, 5, 2, 2]), torch.rand(4, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda z: ops.token_logp(z, y, temperature=tau, entropy=True)[:2], (z,))


def test_opcheck_and_fullgraph():
    z = torch.randn(4, 6, requires_grad=True)
    y, tau = torch.tensor([0, 5, 2, 2]), torch.ones(4)
    opcheck(forward_op, (z, y, tau, True, False))
    logp, h, m, log_s = forward_op(z.detach(), y, tau, True, False)
    parts = (logp, h, z.detach(), y, tau, h, m, log_s)
    opcheck(backward_op, parts)
    opcheck(backward_into_op, tuple(p.clone() for p in parts))
    opcheck(fused_op, (z.detach().clone(), y, tau, logp, h))
    compiled = torch.compile(
        lambda z: ops.token_logp(z, y, entropy=True)[:2], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(z), ops.token_logp(z, y, entropy=True)[:2])


def test_in_place_backward_writes_over_the_logits_and_refuses_a_second_one():
    z = torch.randn(4, 6)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    y = torch.tensor([0, 5, 2, 2])
    ops.token_logp(a, y).logp.sum().backward()
    out = ops.token_logp(b, y, inplace_backward=True).logp.sum()
    out.backward(retain_graph=True)
    torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(b, b.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_batches_views_and_nothing():
    z = torch.randn(2, 5, 8)
    y = torch.randint(8, (2, 5))
    whole = ops.token_logp(z, y).logp
    torch.testing.assert_close(whole, z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1))
    # the view TRL passes
    torch.testing.assert_close(ops.token_logp(z[:, :-1], y[:, :-1]).logp, whole[:, :-1])
    torch.testing.assert_close(ops.token_logp(z[0].T.contiguous().T, y[0]).logp, whole[0])
    assert ops.token_logp(
        torch.empty(0, 8), torch.empty(0, dtype=torch.int64), entropy=True
    ).entropy.shape == (0,)


BACKENDS = [
    b
    for b, state in ops.implementations()["token_logp"].items()
    if b != "cuda" and state in ("ready", "compiled only")
]


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, set where there is no GPU")
    with ops.use_backend(request.param, "token_logp"):
        yield request.param


@pytest.mark.parametrize(
    "view", [lambda z: z[:, :-1], lambda z: z[:, -3:], lambda z: z[1:, ::2], lambda z: z.transpose(0, 1)]
)
def test_views_of_a_batch_are_their_copies(each_backend, view):
    """Wrong: rows taken a stride of V apart, or the batch's stride forgotten.  In place, the rest of the
    batch stays.
    """
    whole = torch.randn(3, 6, 40)
    z, kept = view(whole), view(torch.zeros(3, 6, 40, dtype=torch.bool).logical_not_()).shape
    y, tau = torch.randint(40, kept[:2]), torch.rand(kept[:2]) + 0.5
    results = []
    for x in (z.clone().requires_grad_(), z.contiguous().view(-1, 40).clone().requires_grad_()):
        out = ops.token_logp(x, y.view(x.shape[:-1]), temperature=tau.view(x.shape[:-1]), entropy=True)
        (out.logp.sum() + 0.3 * out.entropy.sum()).backward()
        results.append((out.logp.reshape(-1), out.entropy.reshape(-1), x.grad.reshape(-1, 40)))
    strided = ops.token_logp(z, y, temperature=tau, entropy=True)
    assert torch.equal(strided.logp.reshape(-1), results[1][0])
    assert torch.equal(strided.entropy.reshape(-1), results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    before, ones = whole.clone(), torch.ones(y.numel())
    _, h, m, log_s = forward_op(z, y.reshape(-1), tau.reshape(-1), True, False)
    backward_into_op(ones, 0.3 * ones, z, y.reshape(-1), tau.reshape(-1), h, m, log_s)
    assert torch.equal(z.reshape(-1, 40), results[1][2])
    view(before).copy_(z)
    assert torch.equal(whole, before)


def test_the_view_trl_passes_is_not_copied():
    """Wrong: reshape(-1, V), which doubles the memory of the largest tensor there is."""
    z, y = torch.randn(4, 9, 5000)[:, :-1], torch.randint(5000, (4, 8))
    assert not z.is_contiguous()
    assert peak_bytes(lambda: ops.token_logp(z, y, entropy=True), z.device) < z.numel() * z.itemsize // 20
    assert peak_bytes(lambda: ops.selective_log_softmax(z, y), z.device) < z.numel() * z.itemsize // 20


@pytest.mark.parametrize("V", [7, 1000, 9000])
@pytest.mark.parametrize("entropy", [True, False])
def test_fused_is_forward_then_backward_and_narrow_in_the_front(each_backend, V, entropy):
    """Wrong: a gradient that overwrites logits which are still to be read, or the target's logit read after
    that.
    """
    z, y, tau = 3 * torch.randn(5, V), torch.tensor([0, V - 1, -1, V, V // 2]), torch.rand(5) + 0.5
    up, uh = torch.randn(5), torch.randn(5) if entropy else torch.empty(0)
    stats = forward_op(z, y, tau, entropy, False)
    want = backward_op(up, uh, z, y, tau, *stats[1:])
    for dtype in (None, torch.bfloat16) if each_backend != "cpu" else (None,):  # products on CPU take float32
        for fused in (True, False):
            over = z.clone()
            found = (
                fused_op(over, y, tau, up, uh, dtype)
                if fused
                else backward_into_op(up, uh, over, y, tau, *stats[1:], dtype) or stats
            )
            ours = narrow_view(over, dtype)
            # the interpreter truncates
            tolerance = {"atol": 1e-7, "rtol": 1e-5} if dtype is None else {"atol": 1e-6, "rtol": 2**-7}
            torch.testing.assert_close(ours.float(), want, **tolerance)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, stats, strict=True))


def test_an_off_by_one_target_is_caught():
    """The most common bug of this op, planted: scoring token t with the row of token t."""
    z, y = torch.randn(6, 9), torch.randint(9, (6,))
    assert not torch.allclose(ops.token_logp(z, y.roll(1)).logp, truth(z, y)[1].float(), atol=1e-3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"target": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"target: expected shape \(T=4\), got \(3,\)",
        ),
        ({"target": torch.zeros(4)}, TypeError, "target: expected dtype int32 or int64, got float32"),
        ({"logits": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "logits: expected dtype"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits: expected shape \(T, V\), got \(4,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature: expected a float or shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"logits": torch.zeros(4, 6), "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        ops.token_logp(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_selective_log_softmax_is_trls():
    z = torch.randn(2, 5, 8)
    one, many = torch.randint(8, (2, 5)), torch.randint(8, (2, 5, 3))
    torch.testing.assert_close(
        ops.selective_log_softmax(z, one, 0.7), (z / 0.7).log_softmax(-1).gather(-1, one[..., None])[..., 0]
    )
    torch.testing.assert_close(ops.selective_log_softmax(z, many), z.log_softmax(-1).gather(-1, many))
    with pytest.raises(ValueError, match="index: expected shape"):
        ops.selective_log_softmax(z, one[:1])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_target_outside_is_nan_in_every_implementation(name):
    """Wrong: the log-prob of token 0, which the definition reads in its place."""
    with use(name, "token_logp"):
        logp = ops.token_logp(torch.randn(4, 5), torch.tensor([-1, 5, 2, 0])).logp
    assert logp.isnan().tolist() == [True, True, False, False]
