"""The vocabulary ops on a GPU, every implementation asked for by name: values, the in-place race, launches
that do not wait, size.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support import no_waiting, use, within_budget

from fastrl import ops
from fastrl.kernels.linear_cross_entropy import REDUCTIONS
from fastrl.kernels.token_logp import (
    backward_into_op,
    backward_op,
    forward_op,
    fused_op,
    narrow_view,
    reference,
)

pytestmark = pytest.mark.gpu
VOCABULARIES = [7, 1000, 32000, 50257, 128256, 151936, 152064]
GIB = 2**30


@pytest.fixture(params=["reference", "triton", "cuda"])
def token_logp(request):
    with use(request.param, "token_logp"):
        yield request.param


@pytest.fixture(params=["reference", "triton"])
def cross_entropy(request):
    with use(request.param, "linear_cross_entropy"):  # the plain rows, which are token_logp's, follow
        yield request.param


def case(T, V, dtype=torch.float32, offset=0.0):
    logits = (3 * torch.randn(T, V, device="cuda") + offset).to(dtype)
    return (
        logits,
        torch.randint(V, (T,), device="cuda"),
        *(torch.rand(T, device="cuda") + 0.5 for _ in range(3)),
    )


def run(logits, target, tau, dlogp, dentropy):
    """logp, entropy and the gradient."""
    logp, h, m, log_s = forward_op(logits, target, tau, True, False)
    return logp, h, backward_op(dlogp, dentropy, logits, target, tau, h, m, log_s)


def plain(logits, target, tau, dlogp, dentropy):
    """PyTorch's own."""
    z = logits.clone().requires_grad_()
    wide = z if z.dtype == torch.float64 else z.float()
    log_p = (wide / tau.to(wide.dtype)[:, None]).log_softmax(-1)
    h = -(log_p.exp() * log_p).sum(-1)
    logp = log_p.gather(1, target[:, None]).squeeze(1)
    (logp @ dlogp.to(wide.dtype) + h @ dentropy.to(wide.dtype)).backward()
    return logp, h, z.grad


def need(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free / GIB:.1f}")


# --- token_logp -------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0.0, 1000.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_values(token_logp, V, dtype, offset):
    """Wrong: a tail dropped or read past; 50257 and 7 read as if their rows were aligned; exp2 with too few
    bits at an offset.
    """
    args = case(16, V, dtype, offset)
    exact = plain(args[0].double(), *args[1:])
    ours = run(*args)
    for mine, its, right in zip(ours, plain(*args), exact, strict=True):
        within_budget(mine, its, right)
    # it divides by the temperature before it takes the maximum away
    if token_logp != "reference" or not offset:
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ours[:2], exact[:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [50257, 152064])
def test_in_place_is_out_of_place_a_hundred_times(token_logp, V, dtype):
    """Wrong: a warp that stores a block which another warp of the row has yet to load; the interpreter cannot
    show that.
    """
    logits, target, tau, up, uh = case(512, V, dtype)
    h, m, log_s = forward_op(logits, target, tau, True, False)[1:]
    want = backward_op(up, uh, logits, target, tau, h, m, log_s)
    over = torch.empty_like(logits)
    for _ in range(100):
        over.copy_(logits)
        backward_into_op(up, uh, over, target, tau, h, m, log_s)
        assert torch.equal(over, want)


@pytest.mark.parametrize("V", [7, 1000, 50257, 151936])
@pytest.mark.parametrize(
    "dtype, out", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)], ids=str
)
def test_at_once_and_narrow_a_hundred_times(token_logp, V, dtype, out):
    """Forward and gradient in one op, and bf16 gradients in the front of float32 rows: what two steps give,
    whatever the timing.

    Wrong: a store that passes another warp's load; a slice of a cluster that begins where the row does not.
    """
    logits, target, tau, up, uh = case(96, V, dtype)
    target[:3] = torch.tensor([-1, V, V - 1], device="cuda")
    stats = forward_op(logits, target, tau, True, False)
    want = backward_op(up, uh, logits, target, tau, *stats[1:]).to(out or dtype)
    over = torch.empty(96, V + 5, dtype=dtype, device="cuda")[:, :V]  # rows that begin anywhere
    for i in range(100):
        over.copy_(logits)
        found = fused_op(over, target, tau, up, uh, out) if i % 2 else stats
        if not i % 2:
            backward_into_op(up, uh, over, target, tau, *stats[1:], out)
        for mine, its in zip((*found, narrow_view(over, out)), (*stats, want), strict=True):
            torch.testing.assert_close(
                mine, its, atol=1e-6, rtol=2**-7 if its.dtype == torch.bfloat16 else 1e-5, equal_nan=True
            )


def test_a_view_of_a_batch(token_logp):
    """Wrong: rows taken a stride of V apart."""
    whole = torch.randn(3, 9, 32000, device="cuda")
    z, y = whole[:, :-1], torch.randint(32000, (3, 8), device="cuda")
    a, b = ops.token_logp(z, y, entropy=True), ops.token_logp(z.contiguous(), y, entropy=True)
    assert torch.equal(a.logp, b.logp) and torch.equal(a.entropy, b.entropy)


def test_two_runs_give_the_same_bits(token_logp):
    args = case(300, 50257, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(*args), run(*args), strict=True))


def test_nothing_waits_for_the_device(token_logp):
    logits, target, *_ = case(64, 32000)
    leaf, tau = logits.requires_grad_(), torch.rand(64, device="cuda") + 0.5

    def step():
        out = ops.token_logp(leaf * 1.0, target, temperature=tau, entropy=True, inplace_backward=True)
        (out.logp.sum() + out.entropy.sum()).backward()

    step()  # compiles
    with no_waiting():
        step()


def test_banned_tokens_and_targets_outside(token_logp):
    logits, target, tau, up, uh = case(4, 32000)
    logits[:, ::3] = -torch.inf
    target = torch.tensor([1, -100, 32000, 2], device="cuda")
    logp, h, grad = run(logits, target, tau, up, uh)
    assert logp.isnan().tolist() == [False, True, True, False]
    assert h.isfinite().all() and grad[[0, 3]].isfinite().all()
    torch.testing.assert_close(
        h.double(), reference(logits.double(), target, tau.double(), True)[1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("V", [7, 1000])
def test_70000_rows(token_logp, V):
    """Wrong: rows on a grid axis that ends at 65,535."""
    args = case(70000, V)
    for mine, right in zip(run(*args), plain(args[0].double(), *args[1:]), strict=True):
        assert (mine - right).abs().max() <= 2e-5


def test_more_than_2_31_logits(token_logp):
    """Wrong: offsets in int32.  Only the last rows are compared: they lie beyond 2^31 elements."""
    T, V = 14200, 152064
    need(30 if token_logp == "reference" else 6)
    assert T * V > 2**31
    logits = torch.empty(T, V, dtype=torch.bfloat16, device="cuda").normal_()
    target, tau, up = (
        torch.randint(V, (T,), device="cuda"),
        torch.ones(T, device="cuda"),
        torch.rand(T, device="cuda"),
    )
    tail = slice(T - 8, T)
    want = run(logits[tail].clone(), target[tail], tau[tail], up[tail], up[tail])
    logp, h, m, log_s = forward_op(logits, target, tau, True, True)
    backward_into_op(up, up, logits, target, tau, h, m, log_s)
    for mine, right in zip((logp[tail], h[tail], logits[tail]), want, strict=True):
        assert torch.equal(mine, right)


def test_under_compile(token_logp):
    """Wrong: an op that torch.compile looks into, or compiles again for each number of rows."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def loss(z, y):
        out = ops.token_logp(z * 1.0, y, temperature=0.7, entropy=True)
        return out.logp.sum() + 0.1 * out.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for T in (16, 24, 40):
        logits, target, *_ = case(T, 1000)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        for f, leaf in zip((compiled, loss), leaves, strict=True):
            f(leaf, target).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1


# --- from hidden states -----------------------------------------------------------------------------
def linear_case(T, D, V, dtype=torch.bfloat16):
    hidden, weight = (
        torch.randn(T, D, device="cuda").to(dtype),
        torch.randn(V, D, device="cuda").mul(D**-0.5).to(dtype),
    )
    return hidden, weight, torch.randint(V, (T,), device="cuda"), torch.rand(T, device="cuda") + 0.5


@pytest.mark.parametrize("D", [64, 904, 1536])
@pytest.mark.parametrize("T, V", [(1, 50257), (300, 151936), (129, 1000), (1100, 32000)])
def test_fused_linear_logp(T, V, D):
    """The persistent kernel: within 1e-3 (mean 1e-4) of float64, the same bits twice, and no wait."""
    fused = pytest.importorskip("fastrl.kernels._triton.linear_logp", exc_type=ImportError)
    hidden, weight, target, tau = linear_case(T, D, V)
    for bias in (None, torch.randn(V, device="cuda").bfloat16()):
        z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        exact = reference(z, target, tau.double(), True)
        ours = fused.forward(hidden, weight, target, bias, tau, True)
        for mine, right in zip(ours[:2], exact[:2], strict=True):
            error = (mine - right).abs()
            assert error.max() <= 1e-3 and error.mean() <= 1e-4
        with no_waiting():
            again = fused.forward(hidden, weight, target, bias, tau, True)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("T, D, V", [(5, 2048, 50257), (2100, 1600, 32000)])
def test_linear_logp_in_tiles(T, D, V):
    """A wide model: within 1e-3 (mean 1e-4) of float64, the same bits twice, and no wait."""
    hidden, weight, target, tau = linear_case(T, D, V)
    exact = reference(hidden.double() @ weight.double().T, target, tau.double(), True)
    with use("triton", "linear_logp"):
        ours = ops.linear_logp(hidden, weight, target, temperature=tau, entropy=True)
        with no_waiting():
            again = ops.linear_logp(hidden, weight, target, temperature=tau, entropy=True)
    assert torch.equal(ours.logp, again.logp) and torch.equal(ours.entropy, again.entropy)
    for mine, right in zip(ours[:2], exact[:2], strict=True):
        error = (mine - right).abs()
        assert error.max() <= 1e-3 and error.mean() <= 1e-4


@pytest.mark.parametrize("loss", ["linear_logp", "linear_loss"])
def test_linear_forms_do_not_wait(token_logp, loss):
    hidden, weight, target, tau = linear_case(64, 128, 32000)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        if loss == "linear_logp":
            out = ops.linear_logp(
                hidden, weight, target, temperature=tau, entropy=True, logits_bytes=20 * 32000 * 4
            )
            (out.logp.sum() + out.entropy.sum()).backward()
        else:
            ops.linear_loss(
                hidden, weight, target, lambda p, h, _: -(p + 0.1 * h).sum(), temperature=tau, entropy=True
            )[0].backward()

    step()
    with no_waiting():
        step()


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4}], ids=["plain", "all"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("V", [1000, 50257, 151936])
def test_cross_entropy(cross_entropy, V, reduction, options):
    """Against the reference rows on float64 logits; chunks of 20 rows, some of them ignored."""
    hidden, weight, target, up = linear_case(50, 64, V)
    target[::7] = -100
    results = []
    for dtype, name in ((torch.bfloat16, cross_entropy), (torch.float64, "reference")):
        x, w = (a.to(dtype).requires_grad_() for a in (hidden, weight))
        with ops.use_backend(name, "linear_cross_entropy"):
            out = ops.linear_cross_entropy(
                x, w, target, reduction=reduction, logits_bytes=20 * V * 4, **options
            )
            results.append(
                (out, *torch.autograd.grad((out * up).sum() if reduction == "none" else out, (x, w)))
            )
    ours, exact = results
    assert (ours[0] - exact[0]).abs().max() <= 1e-3 * (1 if reduction != "sum" else len(target))
    for mine, right in zip(ours[1:], exact[1:], strict=True):
        assert (mine - right).abs().max() <= 2**-7 * right.abs().max()


def test_cross_entropy_rows_in_place_a_hundred_times(cross_entropy):
    """The race again, in the rows that overwrite what they read."""
    hidden, weight, target, _ = linear_case(256, 64, 50257)
    runs = []
    for _ in range(100):
        x = hidden.clone().requires_grad_()
        ops.linear_cross_entropy(x, weight, target, softcap=30.0, label_smoothing=0.1).backward()
        runs.append(x.grad)
    assert all(torch.equal(runs[0], r) for r in runs[1:])
