"""rope's Triton kernels under the interpreter, through the op, against float64 and the reference.  Races need
a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import ULP, within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels.rope import Store, backward_op, forward_op, rope_tables, store_op

kernels = pytest.importorskip(
    "fastrl.kernels._triton.rope", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
N = 40
NORMS = {"plain": (False, False), "both": (True, True), "queries": (True, False), "keys": (False, True)}


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "rope"):
        yield


def case(norms=(False, False), T=9, H=4, K=2, E=8, dtype=torch.float32):
    """The arguments of forward_op, and gradients that arrive at its outputs."""
    q, k, dq, dk = (torch.randn(T, heads, E).to(dtype) for heads in (H, K, H, K))
    weights = (
        (1 + 0.2 * torch.randn(E)).to(dtype) if used else torch.empty(0, dtype=dtype) for used in norms
    )
    return (
        q,
        k,
        torch.randint(N, (T,)),
        *rope_tables(E, 100.0, None, N, torch.float32, "cpu"),
        *weights,
        1e-6,
    ), (dq, dk)


def run(args, ups):
    """yq, yk, dq, dk, and the gradients of the norm weights."""
    return *forward_op(*args), *backward_op(*ups, *args)


def wide(x):
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x)


def reference(args, ups):
    with ops.use_backend("reference", "rope"):
        return run(args, ups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("T, H, K, E", [(9, 4, 2, 8), (1, 40, 1, 6), (2, 3, 3, 80)])
def test_values_and_gradients(T, H, K, E, norms, dtype):
    """Wrong: a program's tail of heads that becomes another token's (40 + 1 heads); halves of a width that is
    no power of two (6, 80); the norm of one of queries and keys given to the other; a norm's gradient that is
    summed over one head only.
    """
    args, ups = case(norms, T, H, K, E, dtype)
    ours, its, exact = run(args, ups), reference(args, ups), reference(wide(args), wide(ups))
    for mine, like, right in zip(ours, its, exact, strict=True):
        assert mine.shape == right.shape
        # the interpreter truncates each of up to three roundings
        if dtype == torch.bfloat16 and mine.numel():
            assert (mine.double() - right).abs().max() <= 4 * ULP[dtype] * right.abs().max()
        else:
            within_budget(mine, like, right)


@pytest.mark.parametrize("norms", [(False, False), (True, True)], ids=["plain", "both"])
def test_views_of_a_fused_projection(norms):
    """Wrong: strides of a contiguous tensor assumed; upstream gradients that are views themselves."""
    args, ups = case(norms)
    want = run(args, ups)
    fused, gradient = torch.zeros(9, 8, 8), torch.zeros(9, 8, 8)
    for whole, (a, b) in ((fused, args[:2]), (gradient, ups)):
        whole[:, :4], whole[:, 4:6] = a, b
    views, up_views = fused.split((4, 2, 2), 1)[:2], gradient.split((4, 2, 2), 1)[:2]
    assert all(torch.equal(a, b) for a, b in zip(run((*views, *args[2:]), up_views), want, strict=True))
    odd = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in args[:2]]
    assert all(torch.equal(a, b) for a, b in zip(run((*odd, *args[2:]), ups), want, strict=True))


@pytest.mark.parametrize("norms", [(False, False), (True, True)], ids=["plain", "both"])
def test_keys_and_values_go_to_their_slots(norms):
    """Wrong: keys stored before they are turned, queries stored too, a slot of one token, neighbours of a
    slot touched.
    """
    (q, k, *rest), _ = case(norms)
    v = torch.randn(9, 6, 8)[:, 4:]  # a view
    slots = torch.randperm(30)[:9]
    caches = torch.full((2, 30, 2, 8), 7.0)
    with torch.no_grad():
        yq, yk = store_op(q, k, v, *rest, *caches, slots)
    assert all(torch.equal(a, b) for a, b in zip((yq, yk), forward_op(q, k, *rest), strict=True))
    assert torch.equal(caches[0, slots], yk) and torch.equal(caches[1, slots], v)
    others = torch.ones(30, dtype=torch.bool).index_fill(0, slots, False)
    assert (caches[:, others] == 7.0).all()


def test_the_public_form_checks_the_cache():
    (q, k, positions, cos, sin, *_), _ = case()
    cache, slots = torch.zeros(30, 2, 8), torch.arange(9)
    y = ops.rope(q, k, positions, cos, sin, store=Store(k, cache, cache.clone(), slots))
    assert torch.equal(cache[:9], y[1])
    for bad, message in (
        (Store(k[:3], cache, cache, slots), "store.v: expected shape"),
        (Store(k, cache[:, :1], cache, slots), "store.k_cache: expected shape"),
        (Store(k, cache, cache[1:], slots), "store.v_cache: expected shape"),
        (Store(k, cache, cache, slots[1:]), "store.slots: expected shape"),
        (Store(k, torch.zeros(30, 4, 8)[:, :2], cache, slots), "store.k_cache: expected a contiguous cache"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.rope(q, k, positions, cos, sin, store=bad)


def test_a_position_past_the_tables_is_nan_not_a_read():
    """Wrong: reading there, which on a GPU returns another tensor's numbers."""
    args, _ = case()
    args[2][:3] = torch.tensor([N, -1, 2**40])
    yq, yk = forward_op(*args)
    assert yq[:3].isnan().all()
    assert yk[:3].isnan().all()
    assert yq[3:].isfinite().all()
    assert yk[3:].isfinite().all()


def test_no_tokens():
    for norms in NORMS.values():
        args, ups = case(norms, T=0)
        shapes = [x.shape for x in run(args, ups)]
        assert shapes == [(0, 4, 8), (0, 2, 8)] * 2 + [(8,) if used else (0,) for used in norms]


def test_two_runs_give_the_same_bits():
    args, ups = case((True, True), T=20)
    assert all(torch.equal(a, b) for a, b in zip(run(args, ups), run(args, ups), strict=True))


def test_more_than_2_31_elements():
    """Wrong: token offsets in int32.  The pages between the tokens are never touched."""
    args, ups = case((True, True), T=3, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 4, 8), (2**30, 8, 1))
    far.copy_(args[0])
    assert all(torch.equal(a, b) for a, b in zip(run((far, *args[1:]), ups), run(args, ups), strict=True))


def test_opcheck():
    for norms in ((False, False), (True, True)):
        (q, k, *rest), ups = case(norms, T=2, H=2, K=1)
        opcheck(forward_op, (q.clone().requires_grad_(), k.clone().requires_grad_(), *rest))
        opcheck(backward_op, (*ups, q, k, *rest))
        opcheck(
            store_op,
            (q, k, torch.randn(2, 1, 8), *rest, torch.zeros(4, 1, 8), torch.zeros(4, 1, 8), torch.arange(2)),
        )


def test_under_compile():
    """Wrong: an op that torch.compile looks into."""
    (q, k, positions, cos, sin, *_), _ = case()
    compiled = torch.compile(ops.rope, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, positions, cos, sin)[0], ops.rope(q, k, positions, cos, sin)[0])
