"""The two linear_logp forwards in Triton under the interpreter, against float64.  It shows values: speed and
races need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastrl import ops
from fastrl.kernels._launch import Gpu
from fastrl.kernels.token_logp import reference

kernels = pytest.importorskip(
    "fastrl.kernels._triton.linear_logp", reason="triton is not installed", exc_type=ImportError
)
tiles = pytest.importorskip(
    "fastrl.kernels._triton.linear_logp_wide", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


def case(T, D, V, dtype=torch.bfloat16, bias=False):
    hidden, weight = torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)
    return (
        hidden,
        weight,
        torch.randint(V, (T,)),
        torch.randn(V).to(dtype) if bias else None,
        torch.rand(T) + 0.5,
    )


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
    """Wrong: columns past V that count, or rows past T; a D that is no multiple of the tile (40, 72) or of 16
    bytes (33).
    """
    judge(case(T, D, V, dtype, bias=T == 3))


def test_the_shares_of_a_vocabulary_are_merged():
    """Wrong: shares added without the shift of their maxima; a target that only the first share looks for."""
    hidden, weight, _, _, tau = case(4, 16, 4000)
    assert kernels.shares(1, 16, 8) > 1
    weight[3500:] *= 3  # the largest logits lie in the last share
    judge((hidden, weight, torch.tensor([0, 1999, 2048, 3999]), None, tau), atol=5e-5)


def test_offsets_banned_tokens_and_targets_outside():
    """Wrong: z - logsumexp at an offset of 1000; -inf - -inf in a share that is banned altogether; reading
    another token's logit.
    """
    hidden, weight, target, bias, tau = case(4, 16, 1500, torch.float16, bias=True)
    judge((hidden, weight, target, bias.add(1000), tau), atol=2e-4)  # float32 sums around 1000
    bias[:1100] = -torch.inf
    logp, h = judge((hidden, weight, torch.tensor([1100, 1200, 1300, 1499]), bias, tau))
    assert h.isfinite().all()
    outside = torch.tensor([-100, 1500, 1535, 3])
    logp, h, *_ = kernels.forward(hidden, weight, outside, bias, tau, True)
    assert logp.isnan().tolist() == [True, True, True, False] and logp[3] == -torch.inf and h.isfinite().all()
    nothing = torch.full_like(bias, -torch.inf)
    assert kernels.forward(hidden, weight, target, nothing, tau, True)[0].isnan().all()


def test_rows_that_are_not_contiguous_and_no_rows():
    hidden, weight, target, _, tau = case(3, 16, 50)
    want = kernels.forward(hidden, weight, target, None, tau, True)
    strided = kernels.forward(
        hidden.T.contiguous().T,
        torch.cat([weight, weight], 1)[:, :16],
        target.repeat_interleave(2)[::2],
        None,
        tau,
        True,
    )
    assert all(torch.equal(a, b) for a, b in zip(want, strided, strict=True))
    stats = kernels.forward(hidden[:0], weight, target[:0], None, tau[:0], True)
    assert [x.shape for x in stats] == [(0,)] * 4


@pytest.mark.parametrize(
    "blocks, tiles, processors",
    [(64, 594, 132), (1, 594, 132), (512, 594, 132), (1, 1, 132), (133, 594, 132)],
)
def test_shares_keep_the_processors_busy(blocks, tiles, processors):
    """Wrong: one share when 64 blocks of tokens would leave half the multiprocessors idle."""
    n = kernels.shares(blocks, tiles, processors)
    waves = -(-blocks * n // processors)
    assert 1 <= n <= min(kernels.MAX_SPLITS, tiles)
    assert blocks * n / (waves * processors) >= min(
        0.95, blocks * min(tiles, kernels.MAX_SPLITS) / processors - 0.01
    )


def test_two_runs_give_the_same_bits():
    args = case(5, 24, 700)
    assert all(
        torch.equal(a, b)
        for a, b in zip(kernels.forward(*args, True), kernels.forward(*args, True), strict=True)
    )


# --- tiles ------------------------------------------------------------------------------------------
def in_tiles(args, entropy=True, logits_dtype=torch.float32):
    return tiles.forward(*args, entropy, logits_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, D, V", [(5, 8, 70), (4, 8, 64), (3, 8, 65), (1, 8, 1)])
def test_tiles(monkeypatch, T, D, V, dtype):
    """Wrong: a last tile that counts the columns of the one before; a target on a tile's edge; rows of the
    second row of tiles.
    """
    monkeypatch.setattr(tiles, "ROWS", 2)
    monkeypatch.setattr(tiles, "COLUMNS", 64)
    args = case(T, D, V, dtype, bias=T == 3)
    args[2][-1] = V - 1
    logp, h, m, log_s = in_tiles(args)
    for mine, right in zip((logp, h, m.double() + log_s), truth(*args), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=3e-5, rtol=0)
    alone = in_tiles(args, entropy=False)
    assert alone[1].numel() == 0 and torch.equal(alone[0], logp) and torch.equal(alone[3], log_s)
    rough = in_tiles(args, logits_dtype=dtype)
    torch.testing.assert_close(rough[0], logp, atol=1e-6 if dtype == torch.float32 else 0.1, rtol=0)


def test_tiles_of_banned_tokens_and_targets_outside(monkeypatch):
    """Wrong: -inf - -inf in a tile that is banned altogether; a target of -100 read from the row before."""
    monkeypatch.setattr(tiles, "COLUMNS", 64)
    hidden, weight, _, bias, tau = case(4, 16, 200, torch.float32, bias=True)
    bias[:128] = -torch.inf
    target = torch.tensor([130, 199, 3, -100])
    logp, h, *_ = in_tiles((hidden, weight, target, bias, tau))
    exact = truth(hidden, weight, target, bias, tau)
    assert logp[2] == -torch.inf and logp[3].isnan() and h.isfinite().all()
    torch.testing.assert_close(logp[:2].double(), exact[0][:2], atol=3e-5, rtol=0)
    torch.testing.assert_close(h.double(), exact[1], atol=3e-5, rtol=0)
    assert in_tiles((hidden, weight, target, torch.full_like(bias, -torch.inf), tau))[0].isnan().all()
    assert [x.shape for x in in_tiles((hidden[:0], weight, target[:0], None, tau[:0]))] == [(0,)] * 4


# --- the choice -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "D, dtype, form",
    [(16, torch.float16, kernels), (1600, torch.float16, tiles), (16, torch.float32, tiles)],
    ids=str,
)
def test_the_op_runs_on_it_when_asked(D, dtype, form):
    """Wrong: registered, listed, and never called; a wide model refused, or sent through registers."""
    hidden, weight = torch.randn(5, D).to(dtype), torch.randn(40, D).mul(D**-0.5).to(dtype)
    y = torch.randint(40, (5,))
    expected = ops.linear_logp(hidden, weight, y, entropy=True)
    calls = []
    with pytest.MonkeyPatch.context() as patch, ops.use_backend("triton", "linear_logp"):
        patch.setattr(form, "forward", lambda *a, real=form.forward: calls.append(1) or real(*a))
        got = ops.linear_logp(hidden, weight, y, entropy=True)
    assert calls
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("major, yes", [(8, False), (9, True), (10, True), (12, False)], ids="sm_{}0".format)
def test_only_gpus_with_enough_shared_memory_keep_logits_in_registers(monkeypatch, major, yes):
    """Wrong: ">= (9, 0)", which takes an sm_120, whose 99 KB are less than a program's 131."""
    monkeypatch.setattr(kernels, "gpu", lambda x: Gpu(capability=(major, 0), multiprocessors=100))
    assert kernels.fits(torch.empty(4, 64, dtype=torch.bfloat16)) is yes


def test_a_log_probability_is_at_most_zero():
    """Wrong: the target's logit, rounded apart from those of the sum, gives a little more than 1."""
    hidden, weight = torch.randn(64, 24).bfloat16(), torch.randn(8, 24).bfloat16()
    target = (hidden.float() @ weight.float().T).argmax(1)
    logp = kernels.forward(hidden, weight, target, None, torch.full((64,), 0.05), True)[0]
    assert (logp <= 0).all() and logp.max() > -1e-6
