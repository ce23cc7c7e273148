"""token_logp's Triton kernels under the interpreter, through the op, against float64.  It shows values, not
races: those need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels._launch import aligned_rows
from fastrl.kernels.token_logp import backward_into_op, backward_op, forward_op, reference, reference_backward

kernels = pytest.importorskip(
    "fastrl.kernels._triton.token_logp", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
NONE = torch.empty(0)


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "token_logp"):
        yield


def case(T, V, dtype=torch.float32, offset=0.0):
    logits = (3 * torch.randn(T, V) + offset).to(dtype)
    return logits, torch.randint(V, (T,)), torch.rand(T) + 0.5, torch.randn(T), torch.randn(T)


def run(logits, target, tau, dlogp, dentropy):
    """Both directions: logp, entropy, dlogits; the gradient out of place, and bitwise the same in place."""
    logp, h, m, log_s = forward_op(logits, target, tau, True, True)
    grad = backward_op(dlogp, dentropy, logits, target, tau, h, m, log_s)
    over = logits.clone()
    backward_into_op(dlogp, dentropy, over, target, tau, h, m, log_s)
    torch.testing.assert_close(over, grad, atol=0, rtol=0, equal_nan=True)
    return logp, h, grad


def plain(logits, target, tau, dlogp, dentropy):
    """PyTorch's own, in the compute dtype of the logits."""
    z = logits.clone().requires_grad_()
    wide = z if z.dtype == torch.float64 else z.float()
    log_p = (wide / tau.to(wide.dtype)[:, None]).log_softmax(-1)
    h = -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0)).sum(-1)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    (logp @ dlogp.to(wide.dtype) + h @ dentropy.to(wide.dtype)).backward()
    return logp, h, z.grad


def judge(args):
    ours, theirs, exact = run(*args), plain(*args), plain(args[0].double(), *args[1:])
    for mine, its, right in zip(ours, theirs, exact, strict=True):
        within_budget(mine, its, right)
    for mine, right in zip(ours[:2], exact[:2], strict=True):
        assert (mine - right).abs().max() <= 1e-5
    return ours


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 1000, 5000])
def test_values_and_gradients(V, dtype):
    """Wrong: a tail that is dropped or read past (7, 5000), a merge of lanes that forgets the shift of their
    tops, a gradient in bf16.
    """
    judge(case(5, V, dtype))


@pytest.mark.parametrize("V", [50257, 151936])
def test_one_row_of_a_real_vocabulary(V):
    """Wrong: one running sum over 152k terms, which drifts past the budget."""
    judge(case(1, V))


@pytest.mark.parametrize("offset", [1000.0, -300.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets(offset, dtype):
    """Wrong: z - logsumexp; a maximum that starts at 0 (all below -200); top = m * temperature rounded, which
    costs the gradient 1e-5.
    """
    judge(case(4, 1000, dtype, offset))


def test_banned_tokens():
    """Wrong: -inf - -inf and 0 * -inf; a lane that saw nothing but -inf; a banned target must say -inf, not
    NaN.
    """
    logits, target, *rest = case(4, 5000)
    logits[:, ::2] = -torch.inf
    logits[:, 4000:4999] = -torch.inf
    logits[0], logits[0, 0] = -torch.inf, 2.0  # a single live token: entropy 0
    target = torch.tensor([0, 3, 4999, 1])
    logp, h, grad = judge((logits, target, *rest))
    assert grad.isfinite().all() and (grad[logits == -torch.inf] == 0).all()
    assert h[0] == 0 and logp[0] == 0
    target[3] = 2
    assert forward_op(logits, target, rest[0], False, False)[0][3] == -torch.inf


def test_nothing_to_choose_from_and_nan_say_so():
    """Wrong: a row of -inf that looks uniform (log s = log V); a maximum that drops a NaN."""
    logits, target, tau, *_ = case(3, 300)
    logits[0] = -torch.inf
    logits[1, 17] = torch.nan
    logp, h, _, log_s = forward_op(logits, target, tau, True, False)
    for x in (logp, h, log_s):
        assert x.isnan().tolist() == [True, True, False]


def test_targets_outside_the_vocabulary():
    """Wrong: reading there, which ends the process at -2^40; a NaN that spreads over the gradient."""
    logits, _, tau, up, uh = case(4, 1000)
    target = torch.tensor([-(2**40), 5, 1000, -100])
    logp, h, grad = run(logits, target, tau, up, uh)
    assert logp.isnan().tolist() == [True, False, True, True] and h.isfinite().all()
    z, wide = logits.double(), tau.double()
    want = reference_backward(
        up.double(), uh.double(), z, target, wide, *reference(z, target, wide, True)[1:]
    )
    torch.testing.assert_close(grad.double(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ints", [torch.int32, torch.int64], ids=str)
def test_the_log_prob_alone_is_bitwise_that_beside_the_entropy(ints):
    """Wrong: a variant without the entropy that loads or adds otherwise."""
    logits, target, tau, up, _ = case(3, 5000, torch.bfloat16)
    both, alone = (
        forward_op(logits, target.to(ints), tau, True, False),
        forward_op(logits, target.to(ints), tau, False, False),
    )
    assert alone[1].numel() == 0 and all(torch.equal(both[i], alone[i]) for i in (0, 2, 3))
    grads = [
        backward_op(up, u, logits, target.to(ints), tau, both[1], *both[2:]) for u in (torch.zeros(3), NONE)
    ]
    torch.testing.assert_close(*grads, atol=0, rtol=0)


# --- the op around them -----------------------------------------------------------------------------
def test_end_to_end_through_autograd_in_place_and_strided():
    """The view TRL passes, an upstream gradient of stride 0, a target of stride 2, and the gradient over the
    logits.
    """
    leaf, index = torch.randn(2, 6, 40, requires_grad=True), torch.randint(40, (2, 10))[:, ::2]
    grads = []
    for name, inplace in (("reference", False), ("triton", False), ("triton", True)):
        with ops.use_backend(name, "token_logp"):
            out = ops.token_logp(
                (leaf * 2)[:, :-1], index, temperature=0.7, entropy=True, inplace_backward=inplace
            )
            (out.logp.sum() + 0.1 * out.entropy.sum()).backward()
        grads.append(leaf.grad)
        leaf.grad = None
    torch.testing.assert_close(grads[1], grads[0], atol=2e-6, rtol=0)
    assert torch.equal(grads[1], grads[2])


def test_rows_that_are_not_contiguous():
    """Wrong: a stride of 1 assumed within the row, for the logits or for the gradient written over them; a
    row stride of V assumed.
    """
    logits, target, tau, up, uh = case(3, 50)
    want = run(logits, target, tau, up, uh)
    wide = torch.zeros(3, 80)
    wide[:, :50] = logits
    for view in (logits.T.contiguous().T, wide[:, :50], torch.stack([logits, logits], 2)[..., 0]):
        for mine, right in zip(run(view, target, tau, up, uh), want, strict=True):
            assert torch.equal(mine, right)
        h, m, log_s = forward_op(view, target, tau, True, True)[1:]
        backward_into_op(up, uh, view, target, tau, h, m, log_s)
        assert torch.equal(view, want[2])
    assert (wide[:, 50:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_a_row_lies_does_not_change_its_bits(dtype):
    """Wrong: 16-byte loads that give a lane other columns than single ones do, the halves of a word swapped;
    rows taken for aligned because the first one is.
    """
    V = 9000
    logits, target, tau, up, uh = case(3, V, dtype)
    wide = torch.zeros(3, V + 16, dtype=dtype)
    views = [
        (wide[:, :V], True),
        (wide[:, 1 : V + 1], False),
        (torch.zeros(3, V + 1, dtype=dtype)[:, :V], False),
    ]
    results = []
    for view, aligned in views:
        assert aligned_rows(view) == aligned
        view.copy_(logits)
        results.append(run(view, target, tau, up, uh))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_rows():
    out = ops.token_logp(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), entropy=True)
    assert out.logp.shape == out.entropy.shape == (0,)
    assert backward_op(
        NONE, NONE, torch.empty(0, 8), torch.empty(0, dtype=torch.int64), NONE, NONE, NONE, NONE
    ).shape == (0, 8)


def test_more_than_2_31_elements():
    """Wrong: row offsets in int32, which wrap at the third row.  The pages between the rows are never
    touched.
    """
    stride, V = 2**30, 200
    rows = torch.empty(2 * stride + V, dtype=torch.bfloat16).as_strided((3, V), (stride, 1))
    logits, target, tau, up, uh = case(3, V, torch.bfloat16)
    rows.copy_(logits)
    logp, h, m, log_s = forward_op(rows, target, tau, True, True)
    want = run(logits, target, tau, up, uh)
    backward_into_op(up, uh, rows, target, tau, h, m, log_s)
    assert torch.equal(logp, want[0]) and torch.equal(rows, want[2])
    same = logits[:1].expand(3, V)  # a row stride of 0
    assert torch.equal(
        forward_op(same, target, tau, False, False)[0], forward_op(same.clone(), target, tau, False, False)[0]
    )


def test_two_runs_give_the_same_bits():
    args = case(3, 5000)
    assert all(torch.equal(a, b) for a, b in zip(run(*args), run(*args), strict=True))


def test_a_launch_of_70000_rows(monkeypatch):
    """Wrong: rows on the grid's second axis, which ends at 65,535."""

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **options: None

    grids = []
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    T = 70000
    logits, target, ones = torch.zeros(T, 5), torch.zeros(T, dtype=torch.int64), torch.ones(T)
    stats = forward_op(logits, target, ones, False, False)
    backward_op(ones, NONE, logits, target, ones, *stats[1:])
    assert grids == [(T,), (T,)]


def test_opcheck():
    logits, target, tau, up, uh = case(3, 40)
    opcheck(forward_op, (logits.clone().requires_grad_(), target, tau, True, False))
    h, m, log_s = forward_op(logits, target, tau, True, False)[1:]
    opcheck(backward_op, (up, uh, logits, target, tau, h, m, log_s))
    opcheck(backward_into_op, (up, uh, logits.clone(), target, tau, h, m, log_s))


def test_under_compile():
    """Wrong: an op that torch.compile looks into, or that compiles again for each number of rows."""
    logits, target, *_ = case(4, 30)
    compiled = torch.compile(
        lambda z, y: ops.token_logp(z, y, entropy=True).logp, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(logits, target), ops.token_logp(logits, target).logp, atol=0, rtol=0)


# --- the choice -------------------------------------------------------------------------------------
def test_the_interpreter_runs_only_when_asked_for_by_name(monkeypatch):
    """Wrong: a CPU user who gets the interpreter, a thousand times slower than anything else, because a
    kernel became `ready`.
    """
    assert ops.implementations()["token_logp"]["triton"] == _backend.COMPILED_ONLY
    args = case(2, 10)[:2]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        RuntimeError, match="backend 'triton' was asked for, but it does not run on cpu tensors"
    ):
        ops.token_logp(*args)
    with pytest.raises(RuntimeError, match=r"does not take torch\.float64"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        ops.token_logp(args[0].double(), args[1])


def test_a_ready_triton_kernel_is_still_not_chosen_on_cpu():
    _backend.register("planted", "triton", forward=lambda: "triton")
    _backend.register("planted", "reference", forward=lambda: "reference")
    try:
        assert _backend.pick("planted", torch.zeros(1), "forward")() == "reference"
    finally:
        del _backend._table["planted"]
