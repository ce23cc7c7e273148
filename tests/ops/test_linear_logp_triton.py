"""The fused linear_logp forward in Triton under the interpreter, against float64.  It shows values: speed and races need a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from fastrl import ops
from fastrl.kernels.token_logp import reference

kernels = pytest.importorskip("fastrl.kernels._linear_logp_triton", reason="triton is not installed", exc_type=ImportError)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU")


def case(T, D, V, dtype=torch.bfloat16, bias=False):
    hidden, weight = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden, weight, torch.randint(V, (T,)), torch.randn(V).to(dtype) if bias else None, torch.rand(T) + 0.5


def truth(hidden, weight, target, bias, tau):
    z = hidden.double() @ weight.double().T
    logp, h, m, log_s = reference(z if bias is None else z + bias.double(), target, tau.double(), True)
    return logp, h, m + log_s


def judge(args, atol=3e-5):
    logp, h, m, log_s = kernels.forward(*args, True)
    for mine, right in zip((logp, h, m.double() + log_s), truth(*args), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=atol, rtol=0)
    alone = kernels.forward(*args, False)
    assert alone[1].numel() == 0 and torch.equal(alone[0], logp) and torch.equal(alone[3], log_s)
    return logp, h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, D, V", [(1, 8, 1), (5, 40, 7), (3, 64, 1000), (130, 72, 300), (2, 33, 600)])
def test_ragged_shapes(T, D, V, dtype):
    """Wrong: columns past V that count, or rows past T; a D that is no multiple of the tile (40, 72) or of 16 bytes (33)."""
    judge(case(T, D, V, dtype, bias=T == 3))


def test_the_shares_of_a_vocabulary_are_merged():
    """Wrong: shares added without the shift of their maxima; a target that only the first share looks for."""
    hidden, weight, _, _, tau = case(4, 16, 4000)
    assert kernels.shares(1, 16, 8) > 1
    weight[3500:] *= 3  # the largest logits lie in the last share
    judge((hidden, weight, torch.tensor([0, 1999, 2048, 3999]), None, tau), atol=5e-5)


def test_offsets_banned_tokens_and_targets_outside():
    """Wrong: z - logsumexp at an offset of 1000; -inf - -inf in a share that is banned altogether; reading another token's logit."""
    hidden, weight, target, bias, tau = case(4, 16, 1500, torch.float16, bias=True)
    judge((hidden, weight, target, bias.add(1000), tau), atol=2e-4)  # float32 sums around 1000
    bias[:1100] = -torch.inf
    logp, h = judge((hidden, weight, torch.tensor([1100, 1200, 1300, 1499]), bias, tau))
    assert h.isfinite().all()
    outside = torch.tensor([-100, 1500, 1535, 3])
    logp, h, *_ = kernels.forward(hidden, weight, outside, bias, tau, True)
    assert logp.isnan().tolist() == [True, True, True, False] and logp[3] == -torch.inf and h.isfinite().all()
    assert kernels.forward(hidden, weight, target, torch.full_like(bias, -torch.inf), tau, True)[0].isnan().all()


def test_rows_that_are_not_contiguous_and_no_rows():
    hidden, weight, target, _, tau = case(3, 16, 50)
    want = kernels.forward(hidden, weight, target, None, tau, True)
    strided = kernels.forward(
        hidden.T.contiguous().T, torch.cat([weight, weight], 1)[:, :16], target.repeat_interleave(2)[::2], None, tau, True
    )
    assert all(torch.equal(a, b) for a, b in zip(want, strided, strict=True))
    assert [x.shape for x in kernels.forward(hidden[:0], weight, target[:0], None, tau[:0], True)] == [(0,)] * 4


@pytest.mark.parametrize("blocks, tiles, processors", [(64, 594, 132), (1, 594, 132), (512, 594, 132), (1, 1, 132), (133, 594, 132)])
def test_shares_keep_the_processors_busy(blocks, tiles, processors):
    """Wrong: one share when 64 blocks of tokens would leave half the multiprocessors idle."""
    n = kernels.shares(blocks, tiles, processors)
    waves = -(-blocks * n // processors)
    assert 1 <= n <= min(kernels.MAX_SPLITS, tiles)
    assert blocks * n / (waves * processors) >= min(0.95, blocks * min(tiles, kernels.MAX_SPLITS) / processors - 0.01)


def test_two_runs_give_the_same_bits():
    args = case(5, 24, 700)
    assert all(torch.equal(a, b) for a, b in zip(kernels.forward(*args, True), kernels.forward(*args, True), strict=True))


def test_the_op_runs_on_it_when_asked_and_refuses_a_model_too_wide():
    """Wrong implementation: registered, listed, and never called."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16).half(), torch.randn(40, 16).half()
    y = torch.randint(40, (5,))
    expected = ops.linear_logp(hidden, weight, y, entropy=True)
    calls = []
    with pytest.MonkeyPatch.context() as patch, ops.use_backend("triton", "linear_logp"):
        patch.setattr(kernels, "forward", lambda *a, real=kernels.forward: calls.append(1) or real(*a))
        got = ops.linear_logp(hidden, weight, y, entropy=True)
        with pytest.raises(ValueError, match=r"the triton form of linear_logp expects D <= 1536, got D=2000"):
            ops.linear_logp(torch.zeros(2, 2000).half(), torch.zeros(7, 2000).half(), torch.tensor([0, 1]))
    assert calls
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
