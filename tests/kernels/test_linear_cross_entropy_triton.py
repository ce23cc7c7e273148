"""The Triton rows of linear_cross_entropy under the interpreter: against float64, and end to end through the
op.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import within_budget

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY
from fastrl.kernels.linear_cross_entropy import REDUCTIONS, rows_forward, rows_fused_into
from fastrl.kernels.token_logp import narrow_view

kernels = pytest.importorskip(
    "fastrl.kernels._triton.linear_cross_entropy", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)
# smoothing, softcap, z_loss
OPTIONS = [
    (0.0, 0.0, 0.0),
    (0.1, 0.0, 0.0),
    (0.0, 30.0, 0.0),
    (0.0, 0.0, 0.01),
    (0.1, 5.0, 0.01),
]


def case(N, V, dtype=torch.float32, offset=0.0):
    return (3 * torch.randn(N, V) + offset).to(dtype), torch.randint(V, (N,)), torch.randn(N)


def both(fused_into, logits, target, up, options, dtype=None):
    """Loss and gradient, the gradient over the logits."""
    over = logits.to(dtype or logits.dtype).clone()
    loss = fused_into(over, over, target, up.to(torch.promote_types(over.dtype, torch.float32)), *options)
    return loss, over


def judge(logits, target, up, options):
    ours = both(kernels.fused_into, logits, target, up, options)
    assert torch.equal(kernels.forward(logits, target, *options)[0].nan_to_num(), ours[0].nan_to_num())
    theirs = both(rows_fused_into, logits, target, up, options)
    exact = both(rows_fused_into, logits, target, up, options, torch.float64)
    for mine, its, right in zip(ours, theirs, exact, strict=True):
        within_budget(mine, its, right, factor=2)
    return ours


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 1000, 5000])
def test_rows(V, dtype, options):
    """Wrong: a mean of z over BLOCK columns instead of V; a tanh whose derivative is taken at the capped
    logit; a z-loss of m alone.
    """
    judge(*case(5, V, dtype), options)


@pytest.mark.parametrize("V", [50257, 151936])
def test_one_row_of_a_real_vocabulary(V):
    judge(*case(1, V), (0.1, 30.0, 1e-4))


@pytest.mark.parametrize("offset", [1000.0, -300.0])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_offsets(offset, options):
    """Wrong: a mean of z that is summed before the maximum is taken away (misses 1e-5 at 1000); a maximum
    that starts at 0.
    """
    logits, target, up = case(5, 5000, offset=offset)
    loss, _ = judge(logits, target, up, options)
    exact = rows_forward(logits.double(), target, *options)[0]
    assert ((loss - exact).abs() <= 1e-5 + 2.0**-22 * exact.abs()).all()


def test_small_logits_under_a_softcap_keep_their_digits():
    """Wrong: tanh as 1 - 2 / (exp(2u) + 1) alone, whose error near 0 is 30 * 2^-24 whatever the logit."""
    logits, target, up = torch.randn(3, 1000) * 1e-4, torch.randint(1000, (3,)), torch.ones(3)
    logits[torch.arange(3), target] = torch.tensor([1e-5, -3e-3, 19.0])
    judge(logits, target, up, (0.0, 30.0, 0.0))
    u = torch.cat([torch.linspace(-3, 3, 100), torch.tensor([1e-8, -1e-20, 50.0, -100.0])])
    cap = kernels.forward(
        torch.stack([torch.zeros(104), u], 1), torch.ones(104, dtype=torch.int64), 0.0, 1.0, 0.0
    )[0]
    z = u.double().tanh()
    assert (cap - torch.nn.functional.softplus(-z)).abs().max() <= 3e-7


def test_banned_tokens_and_targets_outside():
    """Wrong: 1e30 instead of inf for smoothing over a banned token; a NaN gradient there; a target that reads
    the next row.
    """
    logits, target, up = case(4, 3000)
    logits[:, 5:2990] = -torch.inf
    target = torch.tensor([1, 2, 2995, 0])
    judge(logits, target, up, (0.0, 0.0, 0.01))
    assert (kernels.forward(logits, target, 0.1, 0.0, 0.0)[0] == torch.inf).all()
    judge(logits, target, up, (0.1, 5.0, 0.0))
    outside = torch.tensor([-1, 3000, -100, 0])
    loss, grad = both(kernels.fused_into, logits, outside, up, (0.0, 0.0, 0.0))
    assert loss.isnan().tolist() == [True, True, True, False] and grad.isfinite().all()
    nothing = torch.full((1, 40), -torch.inf)
    assert kernels.forward(nothing, torch.zeros(1, dtype=torch.int64), 0.0, 0.0, 0.0)[0].isnan()


def test_rows_of_a_wider_buffer_and_more_than_2_31_elements():
    """Wrong: a row stride of V; offsets in int32, which wrap at the third row."""
    logits, target, up = case(3, 200, torch.bfloat16)
    want = both(kernels.fused_into, logits, target, up, OPTIONS[4])
    stride = 2**30
    far = torch.empty(2 * stride + 200, dtype=torch.bfloat16).as_strided((3, 200), (stride, 1))
    far.copy_(logits)
    loss = kernels.fused_into(far, far, target, up, *OPTIONS[4])
    assert torch.equal(loss, want[0]) and torch.equal(far, want[1])
    again = both(kernels.fused_into, logits, target, up, OPTIONS[4])
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("fused_into", [kernels.fused_into, rows_fused_into], ids=["triton", "reference"])
def test_a_narrower_gradient_in_the_front_of_the_rows(fused_into):
    """Wrong: a gradient that overwrites logits which are still to be read.  Several blocks of the kernel to a
    row.
    """
    logits, target, up = case(3, 9000)
    want = both(rows_fused_into, logits, target, up, OPTIONS[4])
    narrow = narrow_view(logits, torch.bfloat16)
    loss = fused_into(narrow, logits, target, up, *OPTIONS[4])
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(narrow.float(), want[1], atol=1e-6, rtol=2**-7)  # the interpreter truncates


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.01}], ids=["plain", "all"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_end_to_end(reduction, logits_dtype, options):
    """Wrong: parts registered under another signature; a backward that leaves the logits as they were; plain
    rows on another backend.
    """
    hidden, weight = (torch.randn(*s, dtype=torch.bfloat16, requires_grad=True) for s in ((9, 16), (40, 16)))
    bias = torch.randn(40, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(40, (9,))
    target[3] = -100
    results = []
    for name in ("reference", "triton"):
        with ops.use_backend(name, "linear_cross_entropy"):
            loss = ops.linear_cross_entropy(
                hidden,
                weight,
                target,
                bias=bias,
                reduction=reduction,
                logits_dtype=logits_dtype,
                logits_bytes=4 * 40 * 4,
                **options,
            )
            results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))))
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(
            mine,
            its,
            atol=1e-2 if mine.dtype == torch.bfloat16 else 1e-5,
            rtol=2e-2 if its.dim() > 1 else 1e-5,
        )


def test_is_registered_but_not_chosen():
    assert ops.implementations()["linear_cross_entropy"]["triton"] == COMPILED_ONLY
    assert ops.backend("cuda")["linear_cross_entropy"] == "reference"


def test_the_grid_and_no_rows(monkeypatch):
    """Wrong: rows on the grid's second axis, which ends at 65,535; a launch of nothing,
    which CUDA refuses.
    """

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    grids = []
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    for N in (0, 70000):
        both(
            kernels.fused_into,
            torch.zeros(N, 5),
            torch.zeros(N, dtype=torch.int64),
            torch.ones(N),
            OPTIONS[0],
        )
    assert grids == [(70000,), (70000,)]
