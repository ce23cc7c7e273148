"""attention against a float64 softmax per sequence: both implementations, uneven lengths, shared heads."""

from __future__ import annotations

import pytest
import torch
from support import use, within_budget
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from fastrl import ops
from fastrl.kernels import attention as module
from fastrl.kernels._attention import padded as _attention_padded
from fastrl.kernels.attention import backward_op, forward_op

LENGTHS = [3, 0, 5, 1, 9, 0, 0, 17, 2, 40, 8, 16]
BACKENDS = ["reference", "cpu", "sdpa_cpu"]


def inputs(lengths=LENGTHS, H=4, K=2, E=8, dtype=torch.float32):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    T = int(cu[-1])
    return [torch.randn(T, heads, E, dtype=dtype, requires_grad=True) for heads in (H, K, K)], cu


def truth(q, k, v, cu, scale=None):
    """The definition, one sequence at a time: masked scores, softmax, weighted sum."""
    out = []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        keys, values = (x[a:b].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = torch.einsum("ihe,jhe->hij", q[a:b], keys) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
        out.append(torch.einsum("hij,jhe->ihe", s.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def test_golden_values():
    """Wrong implementations: a token that does not see itself, one that sees the next, a missing scale."""
    q = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    v = torch.tensor([1.0, 2.0, 10.0]).view(3, 1, 1)
    y = ops.attention(q, q, v, torch.tensor([0, 3], dtype=torch.int32)).flatten()
    # third: (1 + 2 e^2 + 10 e^4) / (1 + e^2 + e^4)
    torch.testing.assert_close(y, torch.tensor([1.0, 1.7310586, 8.9186304]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 1)])
def test_value_and_gradients_within_the_budget_of_pytorch(backend, dtype, H, K):
    """Wrong implementation: shared heads interleaved, so that query head h reads key head h % K."""
    leaves, cu = inputs(H=H, K=K, dtype=dtype)
    up = torch.randn_like(leaves[0])
    results = []
    for cast, fn in ((dtype, ops.attention), (dtype, sdpa), (torch.float64, truth)):
        own = [x.detach().to(cast).requires_grad_() for x in leaves]
        with use(backend, "attention"):
            y = fn(*own, cu)
            results.append((y, *torch.autograd.grad(y, own, up.to(cast))))
    for ours, theirs, exact in zip(*results, strict=True):
        within_budget(ours, theirs, exact)


def sdpa(q, k, v, cu):
    pairs = [(a, b) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) if a < b]
    parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairs]
    return torch.cat(
        [scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True)[0].transpose(0, 1) for p in parts]
    )


@pytest.mark.parametrize("alone", [1, 40, 1000])
@pytest.mark.parametrize("budget", [1, 600, 4000, 1 << 20])
def test_any_block_size_gives_the_same(budget, alone, monkeypatch):
    """Wrong implementations: a block of rows masked as if it began at 0; dk and dv overwritten instead of
    summed over blocks; a sequence that is a batch of its own read from its neighbour's place, or left out.
    """
    monkeypatch.setattr(_attention_padded, "ALONE", alone)
    monkeypatch.setattr(module, "SCORES_BYTES", budget)
    monkeypatch.setattr(_attention_padded, "PADDED_TOKENS", max(1, budget // 100))
    for backend, dtype in (("reference", torch.float64), ("sdpa_cpu", torch.float32)):
        leaves, cu = inputs([70, 3, 33, 65], dtype=dtype)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        with use(backend, "attention"):
            y, expected, up = (
                ops.attention(*leaves, cu, scale=0.4),
                truth(*exact, cu, 0.4),
                torch.randn(171, 4, 8),
            )
            grads = torch.autograd.grad(y, leaves, up.to(dtype))
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        for ours, theirs in zip(
            (y, *grads), (expected, *torch.autograd.grad(expected, exact, up.double())), strict=True
        ):
            torch.testing.assert_close(ours.double(), theirs, atol=tight, rtol=tight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[5] * 3, [5, 5, 0, 5], [5], [4, 6, 5]], ids=str)
def test_sequences_of_one_length_are_a_padded_batch_already(backend, lengths):
    """From views of one projection.  Wrong implementations: a view of rows that lie elsewhere, or of one
    sequence too few; lengths taken for equal because their sum is.
    """
    fused = torch.randn(sum(lengths), 8, 8, requires_grad=True)
    leaves, cu = fused.split((4, 2, 2), 1), torch.tensor([0, *lengths]).cumsum(0).int()
    up = torch.randn(sum(lengths), 4, 8)
    with use(backend, "attention"):
        y = ops.attention(*leaves, cu)
        (grad,) = torch.autograd.grad(y, fused, up)
    exact = fused.detach().double().requires_grad_()
    expected = truth(*exact.split((4, 2, 2), 1), cu)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(expected, exact, up.double())[0], atol=1e-5, rtol=1e-5
    )


def test_gradcheck():
    leaves, cu = inputs([2, 0, 5, 1], E=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, cu), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_sees_nothing_of_its_neighbours_not_even_a_nan(backend):
    """Wrong implementations: attention that ignores cu_seqlens; padding that reads the next sequence,
    weighted 0, but 0 * nan is nan.
    """
    leaves, cu = inputs([3, 4, 2])
    with use(backend, "attention"):
        clean = ops.attention(*leaves, cu)
        spoiled = [x.detach().clone() for x in leaves]
        for x in spoiled:
            x[3:7] = torch.nan
        own = [x.requires_grad_() for x in spoiled]
        y = ops.attention(*own, cu)
        grads = torch.autograd.grad(y[:3].sum() + y[7:].sum(), own)
    outside = [0, 1, 2, 7, 8]
    assert torch.equal(y[outside], clean[outside])
    assert all(g[outside].isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_matter(backend):
    leaves, cu = inputs([12])
    with use(backend, "attention"), torch.no_grad():
        before = ops.attention(*leaves, cu)
        changed = [x.clone() for x in leaves]
        for x in changed:
            x[8:] += 1.0
        after = ops.attention(*changed, cu)
    assert torch.equal(before[:8], after[:8])
    assert not torch.equal(before[8:], after[8:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0]])
def test_empty_sequences(backend, lengths):
    leaves, cu = inputs(lengths)
    with use(backend, "attention"):
        y = ops.attention(*leaves, cu)
        grads = torch.autograd.grad(y.sum(), leaves)
    assert torch.equal(y, leaves[2].repeat_interleave(2, 1))  # a token alone attends to itself
    assert [g.shape for g in grads] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous_and_repeatable(backend):
    (q, k, v), cu = inputs()
    qkv = torch.cat((q, k, v), 1).flatten(1).detach().requires_grad_()
    results = []
    with use(backend, "attention"):
        for copy in (lambda x: x, lambda x: x, torch.clone):
            y = ops.attention(*(copy(x) for x in qkv.view(-1, 8, 8).split((4, 2, 2), 1)), cu)
            results.append((y, torch.autograd.grad(y.square().sum(), qkv)[0]))
    for again in results[1:]:
        assert torch.equal(results[0][0], again[0])
        assert torch.equal(results[0][1], again[1])


def test_large_scores_stay_finite():
    """Wrong implementation: exp of a score without its row's maximum."""
    (q, k, v), cu = inputs([5, 9], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        y = ops.attention((1e3 * q).to(dtype), (1e3 * k).to(dtype), v.to(dtype), cu)
        assert (y - truth(1e3 * q, 1e3 * k, v, cu)).abs().max() < 1e-3


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        (q, k, v), cu = inputs([3, 0, 4], dtype=dtype)
        opcheck(forward_op, (q, k, v, cu, 0.3, 0))
        y, lse = (x.detach() for x in forward_op(q, k, v, cu, 0.3, 0))
        opcheck(backward_op, (torch.randn_like(y), q.detach(), k.detach(), v.detach(), y, lse, cu, 0.3, 0))


def test_errors_name_the_argument():
    (q, k, v), cu = inputs([3, 4])
    with pytest.raises(ValueError, match="k: expected key/value heads K that divide H=4"):
        ops.attention(q, torch.randn(7, 3, 8), torch.randn(7, 3, 8), cu)
    with pytest.raises(ValueError, match=r"v: expected shape \(T=7, K=2, E=8\)"):
        ops.attention(q, k, v[:5], cu)
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing ends from 0 to T=7"):
        ops.attention(q, k, v, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(TypeError, match="k: expected dtype float32"):
        ops.attention(q, k.double(), v, cu)
    with (
        pytest.raises(RuntimeError, match="'cpu' was asked for, but it does not take"),
        ops.use_backend("cpu", "attention"),
    ):
        ops.attention(q.double(), k.double(), v.double(), cu)
