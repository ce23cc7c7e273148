"""gae's Triton kernel under the interpreter, through the op, against a loop over time in float64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from advantage_loops import gae_loop as loop
from support import within_budget

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels.gae import forward_op, gae

kernels = pytest.importorskip(
    "fastrl.kernels._triton.gae", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


@pytest.fixture(autouse=True)
def triton():
    with ops.use_backend("triton", "gae"):
        yield


def case(lengths, dtype=torch.float32, masked=True):
    T = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return (
        torch.randn(T).to(dtype),
        torch.randn(T).to(dtype),
        cu,
        torch.rand(T) > 0.3 if masked else torch.ones(T, dtype=torch.bool),
    )


def run(reward, value, cu, mask, gamma=0.99, lam=0.95):
    return gae(reward, value, cu, gamma=gamma, lam=lam, mask=None if mask.all() else mask)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_values(gamma, lam, masked, dtype):
    """Wrong: blocks joined without the carry (300), a carry over a sequence's end, an observation that
    discounts or resets it.
    """
    reward, value, cu, mask = case((1, 129, 0, 300, 128, 5), dtype, masked)
    ours = run(reward, value, cu, mask, gamma, lam)
    wide = [x.float() for x in (reward, value)]
    exact = loop(*(x.double() for x in wide), cu.tolist(), mask, gamma, lam)
    within_budget(ours.advantage, loop(*wide, cu.tolist(), mask, gamma, lam), exact)
    torch.testing.assert_close(ours.returns, torch.where(mask, ours.advantage + wide[1], 0), atol=0, rtol=0)
    assert ours.advantage.dtype == torch.float32


def test_large_values_that_cancel():
    """Wrong: c = v + lam (r - v), which loses v's own rounding at every token although the values cancel."""
    reward, value, cu, mask = case((400,), masked=False)
    value += 1000
    exact = loop(reward.double(), value.double(), cu.tolist(), mask, 1.0, 1.0)
    # half an ulp of 1000, twice
    assert (run(reward, value, cu, mask, 1.0, 1.0).advantage - exact).abs().max() <= 1.3e-4


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_a_nan_stays_in_its_sequence_and_before_its_token(lam):
    """Wrong: 0 * NaN at a sequence's end or, with lam = 0, one token further than the reward's own
    advantage.
    """
    reward, value, cu, mask = case((30, 200, 20), masked=False)
    clean = run(reward, value, cu, mask, 1.0, lam).advantage
    reward[180] = math.nan
    spoiled = run(reward, value, cu, mask, 1.0, lam).advantage
    bad = torch.zeros(250, dtype=torch.bool)
    bad[30 if lam else 180 : 181] = True
    assert torch.equal(spoiled.isnan(), bad) and torch.equal(spoiled[~bad], clean[~bad])


def test_observations_are_not_read():
    """Wrong: reading a masked token, whose reward may be anything; more than one block of them."""
    reward, value, cu, mask = case((400, 60))
    mask[100:350] = False
    want = run(reward, value, cu, mask)
    reward[~mask], value[~mask] = math.nan, math.inf
    for mine, right in zip(run(reward, value, cu, mask), want, strict=True):
        assert torch.equal(mine, right) and not mine[~mask].any()


# --- the op around it -------------------------------------------------------------------------------
def test_no_tokens_strided_and_long_ends():
    empty = torch.empty(0)
    for ends in ([0], [0, 0, 0]):
        assert gae(empty, empty, torch.tensor(ends), gamma=0.9, lam=0.9).advantage.shape == (0,)
    reward, value, cu, mask = case((40, 50))
    both = torch.stack([reward, value], 1)
    want = run(reward, value, cu, mask)
    again = run(both[:, 0], both[:, 1], cu.long(), torch.stack([mask, mask], 1)[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    mixed = run(reward, value.bfloat16(), cu, mask)
    torch.testing.assert_close(
        mixed.advantage, run(reward, value.bfloat16().float(), cu, mask).advantage, atol=0, rtol=0
    )


def test_two_runs_give_the_same_bits():
    args = case((300, 7))
    assert all(torch.equal(a, b) for a, b in zip(run(*args), run(*args), strict=True))


def test_a_launch_of_70000_sequences(monkeypatch):
    """Wrong: sequences on a grid axis that ends at 65,535; a block that depends on the longest sequence,
    which must be waited for.
    """

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **options: launches.append((grid, options["BLOCK"], options["num_warps"]))

    launches = []
    monkeypatch.setattr(kernels, "gae_kernel", Recorder())
    zeros = torch.zeros(140000)
    gae(zeros, zeros, torch.arange(0, 140001, 2), gamma=1.0, lam=1.0)
    gae(zeros, zeros, torch.tensor([0, 1000, 140000]), gamma=1.0, lam=1.0)
    assert launches == [((70000,), 128, 1), ((2,), 2048, 8)]


def test_opcheck_and_compile():
    reward, value, cu, mask = case((9, 4))
    torch.library.opcheck(forward_op, (reward, value, cu, mask, 0.9, 0.8))
    compiled = torch.compile(
        lambda r, v: gae(r, v, cu, gamma=0.9, lam=0.8), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(reward, value)[0], gae(reward, value, cu, gamma=0.9, lam=0.8).advantage)


def test_compiled_only_and_not_for_float64():
    assert ops.implementations()["gae"]["triton"] == _backend.COMPILED_ONLY
    reward, value, cu, mask = case((3,), torch.float64)
    with pytest.raises(RuntimeError, match=r"does not take torch\.float64"):
        run(reward, value, cu, mask)
