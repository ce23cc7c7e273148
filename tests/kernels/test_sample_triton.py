"""sample's Triton kernels under the interpreter, through the op, against float64 and the definition's
survivors.
"""

from __future__ import annotations

import os

import draws
import pytest
import torch

from fastrl import ops
from fastrl.kernels._philox import MASK, philox, uniform
from fastrl.kernels.sample import forward_op, sample

kernels = pytest.importorskip(
    "fastrl.kernels._triton.sample", reason="triton is not installed", exc_type=ImportError
)
filtered_kernels = pytest.importorskip(
    "fastrl.kernels._triton.sample_filtered", reason="triton is not installed", exc_type=ImportError
)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


@pytest.fixture(autouse=True)
def backend():
    with ops.use_backend("triton", "sample"):
        yield


# --- the noise --------------------------------------------------------------------------------------
kernels_philox4, unit_exponential = kernels.philox4, kernels.unit_exponential
faster = pytest.importorskip("fastrl.kernels._triton._race", exc_type=ImportError).faster


@triton.jit
def exponential_kernel(word, noise, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(noise + lane, unit_exponential(tl.load(word + lane).to(tl.uint32)))


@triton.jit
def words_kernel(counters, key, word, N: tl.constexpr):
    lane = tl.arange(0, N)
    a, b = tl.load(counters + lane), tl.load(counters + N + lane)
    c, d = tl.load(counters + 2 * N + lane), tl.load(counters + 3 * N + lane)
    w = kernels_philox4(a, b, c, d, tl.load(key), tl.load(key + 1))
    for i in tl.static_range(4):
        tl.store(word + i * N + lane, w[i].to(tl.int64))


@triton.jit
def race_kernel(e, p, winner, N: tl.constexpr):
    lane = tl.arange(0, N)
    early, late = tl.load(e + lane), tl.load(e + N + lane)
    likely, other = tl.load(p + lane), tl.load(p + N + lane)
    _, _, first = faster(early, likely, lane, late, other, N + lane)
    tl.store(winner + lane, first)


def test_the_first_of_equals_wins():
    """Wrong: of equal e / p the later token, which no drawn noise shows: two words are seldom the same."""
    e = torch.tensor([[1.0, 1.0, 3.0, 2.0], [1.0, 2.0, 2.0, 1.0]])
    p = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    winner = torch.empty(4, dtype=torch.int32)
    race_kernel[(1,)](e, p, winner, N=4)
    assert winner.tolist() == [0, 1, 6, 7]


def test_words_are_bit_equal():
    """Wrong: products of which the high half is signed, keys bumped before the first round."""
    counters, key = torch.randint(2**32, (4, 256)), torch.randint(2**32, (2,))
    counters[:, 0], counters[:, 1] = 0, MASK
    word = torch.empty(4, 256, dtype=torch.int64)
    words_kernel[(1,)](counters, key, word, N=256)
    assert torch.equal(word, torch.stack(philox(tuple(counters), (key[0], key[1]))))


def test_the_exponential_is_good_to_1e_6_everywhere():
    """Wrong: -log(1 - u) in fp32, which is 0 at u = 2^-33 and infinite at 1 - 2^-33; a polynomial that is
    only good near 0.
    """
    edges = [
        0,
        1,
        2,
        2**23,
        2**24 + 1,
        2**30 - 1,
        2**30,
        2**30 + 1,
        2**31 - 1,
        2**31,
        2**31 + 1,
        MASK - 2**24,
        MASK - 1,
        MASK,
    ]
    word = torch.cat([torch.tensor(edges), torch.randint(2**32, (4096 - len(edges),))])
    noise = torch.empty(4096)
    exponential_kernel[(1,)](word, noise, N=4096)
    exact = uniform(word).neg_().log1p_().neg_()
    assert ((noise.double() - exact) / exact).abs().max() <= 1e-6


def test_the_noise_is_the_reference_s():
    """Wrong: words in another order than (counter, word), a key or counter with its halves exchanged."""
    draws.noise_is_the_definition(39)


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", [{}, {"top_k": 40, "top_p": 0.8, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize(
    "V, dtype",
    [
        (1, torch.float32),
        (7, torch.bfloat16),
        (1000, torch.float16),
        *(pytest.param(V, d, marks=pytest.mark.slow) for V in (1, 7, 1000) for d in kernels.DTYPES),
    ],
    ids=str,
)
def test_draws_hold_to_the_definition(V, dtype, filters):
    """Wrong: a tail that is dropped or drawn (1, 7), one temperature for all rows, a merge of lanes that
    forgets their tops.
    """
    tau = torch.rand(12) + 0.3
    tau[::5] = 0
    draws.judge((3 * torch.randn(12, V)).to(dtype), tau, **filters)


@pytest.mark.parametrize(("V", "dtype"), [(50257, torch.float32), (151936, torch.bfloat16)], ids=str)
def test_rows_of_a_real_vocabulary(V, dtype):
    """Wrong: chunks merged without their tops, a chunk's token counted from its own start, noise that starts
    again in every chunk.
    """
    draws.judge(torch.randn(1, V).to(dtype))


def test_filters_over_several_chunks():
    draws.judge(0.5 * torch.randn(1, 17000), top_k=5000, top_p=0.6)


def test_the_tail_reaches_beyond_24_bits():
    """Token 0 is 19 above 151,935 others, and the definition draws another for this sequence: 24-bit uniforms
    end at 16.6.
    """
    logits = torch.zeros(1, 151936)
    logits[0, 0] = 19.0
    out = sample(logits, seed=5, sequence=torch.tensor([453]), position=torch.tensor([3]))
    assert out.token.tolist() == [68395]


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_offsets(offset):
    """Wrong: z - log E at an offset of 1000, where z is rounded to 6e-5; a maximum that starts at 0."""
    draws.judge(3 * torch.randn(12, 500) + offset, torch.rand(12) + 0.5)


@pytest.mark.parametrize("tau", [1e-4, 0.05, 1e5])
def test_cold_and_hot(tau):
    """Wrong: 0 / 0 where exp(d) underflows."""
    draws.judge(3 * torch.randn(12, 300), torch.full((12,), tau))


# --- filters ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", draws.FILTERS[:4], ids=str)
def test_banned_tokens(filters):
    draws.banned_are_never_drawn(5, 203, **filters)


# --- the op around them -----------------------------------------------------------------------------
def test_rows_without_a_distribution_say_so():
    """Wrong: a token outside the vocabulary where there is nothing to draw;
    a NaN that spreads to other rows.
    """
    logits = torch.randn(4, 203)
    logits[0], logits[1, 17], logits[2, 5] = -torch.inf, torch.nan, torch.inf
    for filters in draws.FILTERS[:4]:
        out = sample(logits, **draws.keys(4), **filters)
        assert ((out.token >= 0) & (out.token < 203)).all()
        for x in out[1:]:
            assert not x[:3].isfinite().any() or x is out.behaviour_logp
            assert x[3].isfinite()


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(3, 20000)
    logits[0, 18000] = logits[0, 17000] = logits[1, 19999] = 2.0
    out = sample(logits, **draws.keys(3), temperature=0.0)
    assert out.token.tolist() == [17000, 19999, 0] and not out.behaviour_logp.any()


def test_the_same_bits_in_any_batch():
    """Wrong: noise indexed by row, rows that are cut by how many there are."""
    draws.independent_of_the_batch(8, 300)
    draws.independent_of_the_batch(4, 300, top_p=0.9)


def test_rows_that_are_not_contiguous():
    """Wrong: a stride of 1 assumed within the row, a row stride of V assumed, row offsets in int32 (the pages
    between are not touched).
    """
    logits, key = torch.randn(3, 50), draws.keys(3)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 50), (2**30, 1))
    far.copy_(logits)
    for view in (
        logits.T.contiguous().T,
        torch.stack([logits, logits], 2)[..., 0],
        far,
        logits[:1].expand(3, 50),
    ):
        for filters in ({}, {"top_k": 5}):
            found, want = (sample(x, **key, **filters) for x in (view, view.contiguous()))
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_no_rows_and_opcheck():
    assert all(x.shape == (0,) for x in sample(torch.empty(0, 5), **draws.keys(0), top_p=0.5))
    key = torch.arange(2)
    torch.library.opcheck(forward_op, (torch.randn(2, 9), key, key, key, torch.ones(2), 3, 0.9, 0.1))


def test_a_launch_of_70000_rows(monkeypatch):
    """Wrong: rows on the grid's second axis, which ends at 65,535."""

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    grids = []
    for module, names in (
        (kernels, ("draw_kernel", "combine_kernel")),
        (filtered_kernels, ("survey_kernel", "draw_kernel", "settle_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder())
    T = 70000
    sample(torch.zeros(T, 5), **draws.keys(T), top_k=2)
    assert grids == [(T,)] * 3
    sample(torch.zeros(T, 5), **draws.keys(T))
    assert grids[3:] == [(T,)] * 2
