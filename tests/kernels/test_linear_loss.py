"""linear_loss: the gradient formed in the forward is the gradient, whatever the loss, the mask, the chunks
and the level.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastrl import ops
from fastrl.bench.timing import peak_bytes
from fastrl.kernels._head import compact
from fastrl.kernels.linear_logp import reference as linear_reference
from fastrl.kernels.linear_loss import reference

T, D, V = 13, 6, 17
ROW = V * 8  # bytes of one row of float64 logits
LEVELS = ["token", "sequence"]


@pytest.fixture
def given():
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((T, D), (V, D), (V,))
    )
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "target": torch.randint(V, (T,)),
        "temperature": torch.rand(T, dtype=torch.float64) + 0.5,
        "mask": torch.rand(T) > 0.4,
    }


def weighted(w):
    def loss(logp, entropy, rows):
        return (w[rows] * (logp.exp() + 0.3 * entropy**2)).sum()

    return loss


W = torch.linspace(0.5, 2.0, T, dtype=torch.float64)


@pytest.mark.parametrize("budget", [3 * ROW, 1 << 20], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck_with_entropy_bias_and_temperature_per_token(given, level, budget):
    fixed = {k: given[k] for k in ("target", "temperature", "mask")}

    def op(hidden, weight, bias):
        return ops.linear_loss(
            hidden,
            weight,
            loss=weighted(W),
            bias=bias,
            entropy=True,
            level=level,
            logits_bytes=budget,
            **fixed,
        )[0]

    leaves = given["hidden"], given["weight"], given["bias"]
    assert torch.autograd.gradcheck(op, leaves)
    true = reference(
        leaves[0],
        leaves[1],
        given["target"],
        weighted(W),
        given["mask"],
        leaves[2],
        given["temperature"],
        True,
    )
    torch.testing.assert_close(op(*leaves), true)


def test_a_sequence_level_loss_sees_every_live_row_once_and_in_order(given):
    calls = []

    def loss(logp, entropy, rows):
        calls.append(rows.tolist())
        return logp.mean().exp()  # not a sum over rows: chunking it would be wrong

    leaves = [given["hidden"], given["weight"]]
    value, _ = ops.linear_loss(
        *leaves, given["target"], loss, mask=given["mask"], level="sequence", logits_bytes=2 * ROW
    )
    assert calls == [given["mask"].nonzero().squeeze(1).tolist()]
    grads = torch.autograd.grad(value, leaves)
    true = reference(*leaves, given["target"], loss, given["mask"], None, torch.ones(T), False)
    torch.testing.assert_close(value, true)
    for ours, theirs in zip(grads, torch.autograd.grad(true, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "level, budget, products", [("token", 2 * ROW, 3), ("sequence", 1 << 20, 3), ("sequence", 2 * ROW, 4)]
)
def test_three_products_of_the_live_rows_and_a_fourth_only_when_the_budget_forces_it(
    given, level, budget, products
):
    live = int(given["mask"].sum())
    with FlopCounterMode(display=False) as counter:
        call = {k: given[k] for k in ("mask", "temperature")}
        ops.linear_loss(
            given["hidden"],
            given["weight"],
            given["target"],
            weighted(W),
            entropy=True,
            level=level,
            logits_bytes=budget,
            **call,
        )
    assert counter.get_total_flops() == products * 2 * live * D * V


def clipped(w):
    """Rows whose index is a multiple of 3 lost their derivative by logp, multiples of 6 that by the entropy
    too.
    """

    def loss(logp, entropy, rows):
        by_logp, by_entropy = ((rows % n != 0).to(logp.dtype) for n in (3, 6))
        return (w[rows] * (by_logp * logp.exp() + 0.3 * by_entropy * entropy**2)).sum()

    return loss


@pytest.mark.parametrize(
    "mask", [None, torch.arange(0, T, 2), torch.tensor([12, 6, 3, 0, 1])], ids=["all", "even", "any order"]
)
@pytest.mark.parametrize(
    "level, budget", [("token", 5 * ROW), ("token", 1 << 20), ("sequence", 1 << 20), ("sequence", 5 * ROW)]
)
def test_rows_without_a_derivative_leave_the_products(given, level, budget, mask):
    """Wrong implementations: a row that only the entropy moves is dropped; the rows that fill the holes keep
    the statistics, the target or the hidden state of those they replaced; positions of the chunk taken for
    positions of the batch.
    """
    leaves = given["hidden"], given["weight"], given["bias"]
    rows = torch.arange(T) if mask is None else mask
    with FlopCounterMode(display=False) as counter:
        value, _ = ops.linear_loss(
            *leaves[:2],
            given["target"],
            clipped(W),
            bias=leaves[2],
            mask=mask,
            entropy=True,
            level=level,
            logits_bytes=budget,
            temperature=given["temperature"],
        )
    logp, h = linear_reference(*leaves[:2], given["target"], leaves[2], given["temperature"])
    true = clipped(W)(logp[rows], h[rows], rows)
    for ours, theirs in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(true, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    chunks = rows.split(5) if budget == 5 * ROW else [rows]
    live = [c[c % 6 != 0].numel() if 8 * int((c % 6 == 0).sum()) >= c.numel() else c.numel() for c in chunks]
    again = sum(live) if level == "sequence" and budget == 5 * ROW and rows.numel() > 5 else 0
    assert counter.get_total_flops() == 2 * D * V * (rows.numel() + 2 * sum(live) + again)
    assert sum(live) < rows.numel()


@pytest.mark.parametrize("level", LEVELS)
def test_a_loss_without_any_derivative_is_zero_gradient(given, level):
    value, _ = ops.linear_loss(
        given["hidden"], given["weight"], given["target"], lambda p, h, r: (p * 0).sum(), level=level
    )
    assert all((g == 0).all() for g in torch.autograd.grad(value, [given["hidden"], given["weight"]]))


@pytest.mark.parametrize("level, chunks", [("token", 8), ("token", 2), ("sequence", 4)])
def test_one_chunk_of_logits_and_one_gradient_are_all_the_memory(level, chunks):
    """Wrong implementations: a fresh buffer while the chunk before is still referred to; logits kept for a
    level that needs none.
    """
    N, width, vocabulary = 64, 8, 2048
    hidden, weight = (
        torch.randn(N, width, requires_grad=True),
        torch.randn(vocabulary, width, requires_grad=True),
    )
    target, chunk = torch.randint(vocabulary, (N,)), N // chunks * vocabulary * 4

    def call():
        ops.linear_loss(
            hidden, weight, target, lambda p, h, r: p.exp().sum(), level=level, logits_bytes=chunk
        )

    call()
    peak, gradient = peak_bytes(call, torch.device("cpu")), vocabulary * width * 4
    assert chunk + gradient <= peak <= 1.1 * (chunk + gradient)


def test_two_runs_give_the_same_bits(given):
    hidden, weight = (given[k].detach().float().requires_grad_() for k in ("hidden", "weight"))

    def run():
        value, _ = ops.linear_loss(
            hidden, weight, given["target"], clipped(W.float()), entropy=True, logits_bytes=4 * ROW
        )
        return value, *torch.autograd.grad(value, [hidden, weight])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_without_gradients_only_the_logits_are_computed(given):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value, _ = ops.linear_loss(
            given["hidden"], given["weight"], given["target"], weighted(W), entropy=True
        )
    assert counter.get_total_flops() == 2 * T * D * V and not value.requires_grad


def test_masked_rows_report_zero_and_rows_by_index_are_the_same_as_by_mask(given):
    call = {"entropy": True, "temperature": given["temperature"]}
    args = given["hidden"], given["weight"], given["target"], weighted(W)
    value, stats = ops.linear_loss(*args, mask=given["mask"], **call)
    again, _ = ops.linear_loss(*args, mask=given["mask"].nonzero().squeeze(1), **call)
    assert torch.equal(value, again)
    plain = ops.linear_logp(
        given["hidden"], given["weight"], given["target"], entropy=True, temperature=given["temperature"]
    )
    for ours, theirs in zip(stats, plain, strict=True):
        assert (ours[~given["mask"]] == 0).all() and not ours.requires_grad
        torch.testing.assert_close(ours[given["mask"]], theirs[given["mask"]].detach())


def test_backward_scales_and_two_backwards_agree(given):
    value, _ = ops.linear_loss(given["hidden"], given["weight"], given["target"], lambda p, h, r: -p.sum())
    one = torch.autograd.grad(value, given["weight"], retain_graph=True)[0]
    three = torch.autograd.grad(3 * value, given["weight"], retain_graph=True)[0]
    again = torch.autograd.grad(value, given["weight"])[0]
    torch.testing.assert_close(three, 3 * one)
    assert torch.equal(one, again)


def test_weight_grad_gathers_micro_batches(given):
    hidden, weight = (
        given["hidden"].detach().float().requires_grad_(),
        given["weight"].detach().float().requires_grad_(),
    )
    buffer = torch.zeros(V, D)
    for part in (slice(0, 5), slice(5, T)):
        ops.linear_loss(
            hidden[part], weight, given["target"][part], lambda p, h, r: -p.sum(), weight_grad=buffer
        )[0].backward()
    assert weight.grad is None
    ops.linear_loss(hidden, weight, given["target"], lambda p, h, r: -p.sum())[0].backward()
    torch.testing.assert_close(buffer, weight.grad)


def test_an_all_masked_batch_is_zero_with_zero_gradients(given):
    for level in LEVELS:
        value, _ = ops.linear_loss(
            given["hidden"],
            given["weight"],
            given["target"],
            lambda p, h, r: -p.sum(),
            mask=torch.zeros(T, dtype=torch.bool),
            level=level,
        )
        grads = torch.autograd.grad(value, [given["hidden"], given["weight"]])
        assert value == 0 and all((g == 0).all() for g in grads)


def test_a_frozen_weight_and_a_frozen_trunk(given):
    args = given["target"], lambda p, h, r: -p.sum()
    both = torch.autograd.grad(
        ops.linear_loss(given["hidden"], given["weight"], *args)[0], [given["hidden"], given["weight"]]
    )
    trunk = torch.autograd.grad(
        ops.linear_loss(given["hidden"], given["weight"].detach(), *args)[0], given["hidden"]
    )[0]
    head = torch.autograd.grad(
        ops.linear_loss(given["hidden"].detach(), given["weight"], *args)[0], given["weight"]
    )[0]
    assert torch.equal(trunk, both[0]) and torch.equal(head, both[1])


def test_fullgraph_with_row_indices(given):
    rows = given["mask"].nonzero().squeeze(1)

    def op(hidden, weight):
        return ops.linear_loss(hidden, weight, given["target"], weighted(W), mask=rows, entropy=True)[0]

    leaves = given["hidden"], given["weight"]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, op(*leaves))
    for ours, theirs in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(op(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_policy_loss_works_as_the_loss(given):
    """A registered op with autograd cannot run under torch.func.vjp; policy_loss must."""
    old, advantage = torch.randn(T, dtype=torch.float64).sub(3), torch.randn(T, dtype=torch.float64)

    def loss(logp, entropy, rows):
        weight = torch.full_like(logp, 1 / T)
        return ops.policy_loss(
            logp,
            old[rows],
            advantage[rows],
            surrogate="clip",
            token_weight=weight,
            entropy=entropy,
            entropy_coef=0.1,
        )[0]

    leaves = given["hidden"], given["weight"]
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_loss(h, w, given["target"], loss, entropy=True, logits_bytes=3 * ROW)[0],
        leaves,
    )


def test_bad_arguments_are_named(given):
    args = given["hidden"], given["weight"], given["target"]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for change, error, message in (
        (
            {"loss": lambda p, h, r: (scale * p).sum()},
            ValueError,
            "loss: it closes over 'scale', which requires grad",
        ),
        ({"loss": 3}, TypeError, "loss: expected a function"),
        ({"level": "batch"}, ValueError, "level: expected one of 'token', 'sequence'; got 'batch'"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: expected shape \(T=13\), got \(3,\)"),
        ({"weight_grad": torch.zeros(2, 2)}, ValueError, "weight_grad: expected shape"),
    ):
        with pytest.raises(error, match=message):
            ops.linear_loss(*args, **({"loss": lambda p, h, r: -p.sum()} | change))


def test_many_live_rows_move_to_the_front():
    """Wrong: rows that are moved in parts, each to the places of another part."""
    logits, live = torch.randn(100, 3), torch.arange(50, 100)
    before = logits.clone()
    moved, numbers = compact(logits, live)
    assert torch.equal(moved, before[numbers])
    assert torch.equal(numbers.sort().values, live)
