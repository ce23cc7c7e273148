"""rope's C++ kernels against float64 on every instruction set this processor has.  Without fastrl._C:
skipped, visibly.
"""

from __future__ import annotations

import pytest
import torch
from support import within_budget

from fastrl import ops
from fastrl.kernels._backend import backend, extension
from fastrl.kernels.rope import Store, backward_op, forward_op, rope_tables, store_op

C = extension()
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)
N = 64
NORMS = {"plain": (False, False), "both": (True, True), "queries": (True, False), "keys": (False, True)}


def case(norms=(False, False), T=9, H=4, K=2, E=32, dtype=torch.float32):
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


def run(name, args, ups):
    """yq, yk, dq, dk, and the gradients of the norm weights."""
    with ops.use_backend(name, "rope"):
        return *forward_op(*args), *backward_op(*ups, *args)


def wide(x):
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("T, H, K, E", [(70, 4, 2, 32), (33, 3, 3, 80), (5, 7, 1, 6), (4, 2, 1, 4)])
def test_as_near_to_float64_as_the_reference(isa, T, H, K, E, norms, dtype):
    """Wrong: a tail of a half that is dropped or runs into the other half (80, 6, 4); the norm of one of
    queries and keys given to the other; tokens of the second and third block (70) missing in a norm's
    gradient; one rounding instead of the norm's two.
    """
    args, ups = case(norms, T, H, K, E, dtype)
    ours, its, exact = (
        run("cpu", args, ups),
        run("reference", args, ups),
        run("reference", wide(args), wide(ups)),
    )
    for mine, like, right in zip(ours, its, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        within_budget(mine, like, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", [(False, False), (True, True)], ids=["plain", "both"])
def test_the_bits_of_a_token_are_its_own(isa, threads, norms, dtype):
    """What the sampler turns and stores is what the trainer turns.  Wrong: another code path with a cache, or
    for the last token.
    """
    (q, k, positions, *rest), ups = case(norms, T=300, dtype=dtype)
    v, slots = torch.randn(300, 2, 32).to(dtype), torch.randperm(400)[:300]
    expected = run("cpu", (q, k, positions, *rest), ups)
    for n in (1, 3):
        threads(n)
        caches = torch.zeros(2, 400, 2, 32, dtype=dtype)
        with ops.use_backend("cpu", "rope"):
            y = store_op(q, k, v, positions, *rest, *caches, slots)
            alone = [forward_op(q[t : t + 1], k[t : t + 1], positions[t : t + 1], *rest) for t in (0, 7, 299)]
        assert torch.equal(caches[0, slots], expected[1]) and torch.equal(caches[1, slots], v)
        for which in (0, 1):
            assert torch.equal(y[which], expected[which])
            assert torch.equal(torch.cat([x[which] for x in alone]), expected[which][[0, 7, 299]])
        again = run("cpu", (q, k, positions, *rest), ups)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@needs_c
@pytest.mark.parametrize("norms", [(False, False), (True, True)], ids=["plain", "both"])
def test_views_of_a_fused_projection(norms):
    """Wrong: strides of a contiguous tensor assumed; upstream gradients or values that are views themselves;
    slots nearby touched.
    """
    args, ups = case(norms)
    want = run("cpu", args, ups)
    fused, gradient = torch.zeros(9, 8, 32), torch.zeros(9, 8, 32)
    for whole, (a, b) in ((fused, args[:2]), (gradient, ups)):
        whole[:, :4], whole[:, 4:6], whole[:, 6:] = a, b, b
    views, up_views = fused.split((4, 2, 2), 1), gradient.split((4, 2, 2), 1)[:2]
    assert all(
        torch.equal(a, b) for a, b in zip(run("cpu", (*views[:2], *args[2:]), up_views), want, strict=True)
    )
    caches, slots = torch.full((2, 30, 2, 32), 7.0), torch.randperm(30)[:9]
    with ops.use_backend("cpu", "rope"):
        store_op(*views, *args[2:], *caches, slots.int())
    assert torch.equal(caches[0, slots], want[1]) and torch.equal(caches[1, slots], args[1])
    others = torch.ones(30, dtype=torch.bool).index_fill(0, slots, False)
    assert (caches[:, others] == 7.0).all()
    odd = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in args[:2]]
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", (*odd, *args[2:]), ups), want, strict=True))


@needs_c
def test_weights_and_tables_of_another_dtype():
    """Wrong: a weight read as if it had the dtype of the activations; its gradient in theirs."""
    args, ups = case((True, True), dtype=torch.bfloat16)
    want = run("cpu", args, ups)
    mixed = (*args[:3], *(x.double() for x in args[3:5]), *(x.float() for x in args[5:7]), 1e-6)
    got = run("cpu", mixed, ups)
    assert [x.dtype for x in got[4:]] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))


@needs_c
def test_nothing_is_read_or_written_outside():
    """Wrong: a position or a slot that is trusted."""
    (q, k, positions, *rest), ups = case()
    cache = torch.zeros(9, 2, 32)
    with ops.use_backend("cpu", "rope"):
        for bad in (-1, N):
            with pytest.raises(ValueError, match=r"positions: expected values in \[0, 64\), got"):
                forward_op(q, k, torch.full((9,), bad), *rest)
            with pytest.raises(ValueError, match=r"positions: expected values in \[0, 64\), got"):
                backward_op(
                    *ups, q, k, torch.full((9,), bad), *rest[:2], torch.ones(32), torch.ones(32), 1e-6
                )
        with pytest.raises(ValueError, match=r"store.slots: expected values in \[0, 9\), got 1 to 9"):
            ops.rope(q, k, positions, *rest[:2], store=Store(k, cache, cache.clone(), torch.arange(9) + 1))
    assert not cache.any()


@needs_c
def test_no_tokens_and_no_heads():
    """Wrong: a norm's gradient that is left as it was allocated."""
    for norms in NORMS.values():
        args, ups = case(norms, T=0)
        out = run("cpu", args, ups)
        assert [x.shape for x in out[:4]] == [(0, 4, 32), (0, 2, 32)] * 2
        assert [x.tolist() for x in out[4:]] == [[0.0] * 32 if used else [] for used in norms]


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs."""
    assert backend("cpu")["rope"] == "cpu"


@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"E": 3}, "E: expected an even width, got 3"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"q": 0}, "yq, yk, q, k, positions, cos, sin: expected addresses, got 0"),
        ({"v": 8}, "k_cache, v_cache, slots: expected addresses beside v, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "yq": 8,
        "yk": 8,
        "q": 8,
        "qt": 4,
        "qh": 4,
        "k": 8,
        "kt": 4,
        "kh": 4,
        "code": 0,
        "positions": 8,
        "cos": 8,
        "sin": 8,
        "N": 1,
    }
    given |= {
        "q_norm": 0,
        "k_norm": 0,
        "eps": 1e-6,
        "sense": 1.0,
        "v": 0,
        "vt": 0,
        "vh": 0,
        "k_cache": 0,
        "v_cache": 0,
        "slots": 0,
    }
    with pytest.raises(ValueError, match=message):
        C.rope_forward_cpu(
            *(given | {"rows": 0, "T": 1, "H": 1, "K": 1, "E": 4, "threads": 1} | changes).values()
        )
