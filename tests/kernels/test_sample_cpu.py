"""csrc/cpu/sample.cpp on every instruction set this processor has, against float64 and the definition's
survivors.
"""

from __future__ import annotations

import draws
import pytest
import torch

from fastrl.kernels import _backend
from fastrl.kernels._backend import extension, use_backend
from fastrl.kernels.sample import sample

C = extension()
pytestmark = pytest.mark.skipif(
    not hasattr(C, "sample_forward_cpu"), reason="fastrl._C is not built: python setup.py build_ext --inplace"
)
needs_one = pytest.mark.parametrize("isa", ["best"], indirect=True)  # what does not depend on the vectors


@pytest.fixture(autouse=True)
def cpu(isa):
    with use_backend("cpu", "sample"):
        yield


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", draws.FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 1000])
def test_draws_hold_to_the_definition(V, dtype, filters):
    """Wrong: a tail that is dropped or read past (7, 1000), one temperature for all rows, a bound that skips
    a token which could win.
    """
    tau = torch.rand(200) + 0.3
    tau[::7] = 0
    draws.judge((3 * torch.randn(200, V)).to(dtype), tau, **filters)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 20000, "top_p": 0.5, "min_p": 0.01}], ids=str
)
def test_a_real_vocabulary(filters):
    """Wrong: one fp32 sum over the row; survivors off by one, which shows where every one of them counts
    (1e-5 of the mass).
    """
    draws.judge(0.5 * torch.randn(4, 50257), **filters)


def test_the_noise_is_the_reference_s():
    """Wrong: words in another order than (counter, word), a key or counter with its halves exchanged, keys
    bumped once too often.
    """
    draws.noise_is_the_definition(203)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_offsets(offset):
    """Wrong: z - log E at an offset of 1000, where z is rounded to 6e-5; a maximum that starts at 0."""
    draws.judge(3 * torch.randn(100, 500) + offset, torch.rand(100) + 0.5)


@pytest.mark.parametrize("tau", [1e-4, 0.05, 30.0, 1e5])
def test_cold_and_hot(tau):
    """Wrong: exp(d) = 0 beside a noise of 0, and the bound that never skips or always does."""
    draws.judge(3 * torch.randn(100, 300), torch.full((100,), tau))
    draws.judge(3 * torch.randn(20, 300), torch.full((20,), tau), top_p=0.7)


@needs_one
def test_the_tail_reaches_beyond_24_bits(isa):
    """Token 0 is 19 above 151,935 others: each 1,200th draw is another (16 of these 2,000 in which the
    definition says so, 3 expected).

    Wrong: noise from 24-bit uniforms, which ends at 16.6 and never draws another.
    """
    logits, N = torch.zeros(1, 151936), 2000
    logits[0, 0] = 19.0
    out = sample(logits.expand(N, -1), seed=5, sequence=torch.arange(N), position=torch.full((N,), 3))
    found = [453, 694, 826, 1026, 1264, 1289]
    assert out.token.nonzero().flatten().tolist() == found
    rows = torch.tensor(found)
    with use_backend("reference", "sample"):
        theirs = sample(
            logits.expand(len(rows), -1), seed=5, sequence=rows, position=torch.full((len(rows),), 3)
        )
    assert torch.equal(out.token[rows], theirs.token)


def test_frequencies():
    """10^5 draws of 8 tokens: chi-square, 7 degrees of freedom, p = 1e-3.  Wrong: a race that the first or
    the last to enter favours.
    """
    logits, N = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -1.5, 1.2, -3.0]), 100_000
    rows = torch.arange(N)
    token = sample(logits.expand(N, 8), seed=11, sequence=rows, position=rows).token
    p = logits.double().softmax(0)
    assert float(((torch.bincount(token, minlength=8) - N * p).square() / (N * p)).sum()) < 24.32


# --- filters ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "filters", [*draws.FILTERS, {"top_k": 150}, {"top_p": 0.5, "min_p": 1.0}, {"top_p": 1 - 2**-53}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_survive_together(dtype, filters):
    """Wrong: a count that cuts a tie by position, sums that include the tie, -0 below +0."""
    draws.judge(draws.tied(150, 203).to(dtype), torch.rand(150) + 0.5, **filters)


@pytest.mark.parametrize("filters", draws.FILTERS, ids=str)
def test_banned_tokens(filters):
    draws.banned_are_never_drawn(100, 203, **filters)


# --- robustness -------------------------------------------------------------------------------------
def test_rows_without_a_distribution_say_so():
    """Wrong: a token outside the vocabulary, or an endless search, where there is nothing to draw; a NaN that
    spreads to other rows.
    """
    logits = torch.randn(4, 203)
    logits[0], logits[1, 17], logits[2, 5] = -torch.inf, torch.nan, torch.inf
    for filters in draws.FILTERS:
        out = sample(logits, **draws.keys(4), **filters)
        assert ((out.token >= 0) & (out.token < 203)).all()
        for x in out[1:]:
            assert not x[:3].isfinite().any() or x is out.behaviour_logp
            assert x[3].isfinite()


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(3, 203)
    logits[0, 150] = logits[0, 40] = logits[1, 202] = 2.0
    out = sample(logits, **draws.keys(3), temperature=0.0, top_k=2)
    assert out.token.tolist() == [40, 202, 0] and not out.behaviour_logp.any()


@needs_one
@pytest.mark.parametrize("view", ["columns", "rows", "transposed", "expanded"])
def test_non_contiguous_logits(isa, view):
    """Wrong: a row stride taken to be V, or a column stride taken to be 1."""
    x = torch.randn(12, 80)
    logits = {"columns": x[:, 3:70], "rows": x[::3], "transposed": x.t(), "expanded": x[:1].expand(6, 80)}[
        view
    ]
    key = draws.keys(logits.shape[0])
    for filters in ({}, {"top_p": 0.9}):
        for a, b in zip(
            sample(logits, **key, **filters), sample(logits.contiguous(), **key, **filters), strict=True
        ):
            assert torch.equal(a, b)


def test_the_same_bits_in_any_batch_and_on_any_number_of_threads(threads):
    """Wrong: noise indexed by row, buffers that two threads share, a reduction shared out by threads."""
    for filters in ({}, {"top_k": 30, "top_p": 0.9}):
        draws.independent_of_the_batch(40, 1003, **filters)
        logits, key = torch.randn(70, 3001), draws.keys(70)
        found = []
        for n in (1, 2, 3):
            threads(n)
            found.append(sample(logits, **key, **filters))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_one
def test_offsets_beyond_2_to_the_31(isa):
    """Wrong: a 32-bit row offset.  The pages between the rows are never touched."""
    logits = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 7), (2**30, 1))
    logits.copy_(torch.randn(3, 7))
    key = draws.keys(3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sample(logits, **key), sample(logits.contiguous(), **key), strict=True)
    )


@needs_one
def test_no_rows(isa):
    assert all(x.shape == (0,) for x in sample(torch.empty(0, 5), **draws.keys(0), top_p=0.5))


@needs_one
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"B": -1}, "B: expected at least 0, got -1"),
        ({"V": 0}, "V: expected at least 1, got 0"),
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"top_p": 0.0}, "top_p: expected above 0, got 0"),
        ({"seed": 0}, "seed, sequence, position, temperature: expected addresses, got 0"),
        ({"token": 0}, "token, logp, behaviour_logp, entropy: expected addresses, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(isa, changes, message):
    given = {"logits": 8, "code": 0, "stride": 4} | dict.fromkeys(
        ("seed", "sequence", "position", "temperature", "token", "logp", "behaviour_logp", "entropy"), 8
    )
    given |= {"B": 1, "V": 4, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "threads": 1}
    with pytest.raises(ValueError, match=message):
        C.sample_forward_cpu(*(given | changes).values())


def test_chosen_by_default_on_cpu(monkeypatch):
    """Wrong: a kernel that is built and never runs."""
    seen = []
    real = C.sample_forward_cpu
    monkeypatch.setattr(C, "sample_forward_cpu", lambda *a: (seen.append(1), real(*a)))
    monkeypatch.setattr(_backend, "requested", lambda op: None)
    # the definition takes the rest
    for dtype, runs in (
        (torch.float32, 1),
        (torch.bfloat16, 1),
        (torch.float16, 0),
        (torch.float64, 0),
    ):
        seen.clear()
        sample(torch.randn(3, 50).to(dtype), **draws.keys(3))
        assert len(seen) == runs
