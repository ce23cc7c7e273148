"""sample against frequencies, a brute-force definition of the filters, and the published answers of its
generator.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import within_budget
from torch import Tensor

from fastrl.kernels._philox import MASK, interleave, philox, uniform
from fastrl.kernels.sample import exponential, forward_op, reference, sample

F64 = torch.float64


def arange(n: int) -> Tensor:
    return torch.arange(n)


def draw(logits: Tensor, **options: Any) -> Any:
    """Row i is sequence i at position 0 unless said otherwise."""
    B = logits.shape[0]
    return sample(
        logits, **{"seed": 0, "sequence": arange(B), "position": torch.zeros(B, dtype=torch.int64), **options}
    )


# --- the generator ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter: Any, key: Any, words: Any) -> None:
    """Known answers of Random123: catches 64-bit products that lose their top bit, and keys bumped before the
    first round.
    """
    got = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in Python's unbounded integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & MASK, (p >> 32) ^ d ^ k1, p & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [a, b, c, d]


def test_noise_is_keyed_as_documented() -> None:
    """Counter (v // 4, position, sequence), word v % 4, key seed: the layout a compiled kernel must reproduce
    bit for bit.
    """
    seed, sequence, position, V = 2**40 + 5, 2**33 + 7, 11, 10
    got = exponential(*(torch.tensor([x]) for x in (seed, sequence, position)), V)[0]
    for v in range(V):
        x = philox_in_python([v // 4, position, sequence & MASK, sequence >> 32], [seed & MASK, seed >> 32])[
            v % 4
        ]
        assert float(got[v]) == pytest.approx(-math.log1p(-(x + 0.5) / 2**32), rel=1e-14)


def test_uniforms_stay_inside_zero_and_one() -> None:
    """Catches x 2^-32, whose 0 makes a token certain, and fp32, in which the largest word gives 1; Gumbel
    noise reaches 22.8.
    """
    words = interleave(tuple(torch.tensor([w]) for w in (0, MASK, 1, 2)), 3)  # type: ignore[arg-type]
    assert words.tolist() == [0, MASK, 1]
    assert uniform(words).tolist() == [2.0**-33, 1 - 2.0**-33, 1.5 * 2.0**-32]
    assert float(-(-torch.log1p(-uniform(words[0]))).log()) > 22.8  # a 24-bit uniform caps it at 16.6


# --- the draw ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9, "min_p": 0.1}],
)
def test_frequencies(options: dict[str, Any]) -> None:
    """10^5 draws, chi-square at p > 1e-3 on a fixed seed: catches log E added instead of subtracted, and
    noise shared by tokens.
    """
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -1.5, 1.2, -3.0])
    N = 100_000
    out = draw(logits.expand(N, 8), seed=3, **options)
    p = kept_probabilities(
        logits.double() / options.get("temperature", 1.0),
        **{k: v for k, v in options.items() if k != "temperature"},
    )
    count = torch.bincount(out.token, minlength=8).double()
    assert not count[p == 0].any()
    live = p > 0
    chi2 = float(((count - N * p)[live].square() / (N * p)[live]).sum())
    limit = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}[int(live.sum()) - 1]
    assert chi2 < limit
    torch.testing.assert_close(out.behaviour_logp.double(), p[out.token].log(), atol=1e-5, rtol=0)


def test_neighbouring_draws_are_independent() -> None:
    """Pairs of tokens at positions t and t + 1, and of sequences i and i + 1: catches a counter in which two
    of the indices overlap.
    """
    logits = torch.zeros(40_000, 4)
    base = draw(logits, position=arange(40_000), sequence=torch.zeros(40_000, dtype=torch.int64)).token
    for a, b in (
        (base[:-1], base[1:]),
        (base, draw(logits).token),
        (base, draw(logits, position=arange(40_000), seed=1).token),
    ):
        table = torch.bincount(4 * a + b, minlength=16).double() / a.numel()
        # chi-square, 15 degrees of freedom, p = 1e-3
        assert float(((table - 1 / 16) ** 2).sum() * 16 * a.numel()) < 37.7


def test_a_draw_does_not_depend_on_the_batch() -> None:
    """Catches noise indexed by row: the same (seed, sequence, position) gives the same token anywhere."""
    g = torch.Generator().manual_seed(0)
    logits, sequence, position = (
        torch.randn(50, 33, generator=g),
        torch.randint(0, 2**40, (50,), generator=g),
        arange(50) * 3,
    )
    whole = draw(logits, sequence=sequence, position=position, seed=9, top_p=0.95)
    order = torch.randperm(50, generator=g)[:17]
    part = draw(logits[order], sequence=sequence[order], position=position[order], seed=9, top_p=0.95)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[order], b, atol=1e-6, rtol=0)
    assert torch.equal(whole.token[order], part.token)
    assert not torch.equal(
        whole.token, draw(logits, sequence=sequence, position=position, seed=10, top_p=0.95).token
    )
    per_row = draw(
        logits,
        sequence=sequence,
        position=position,
        seed=torch.full((50,), 9),
        temperature=torch.ones(50),
        top_p=0.95,
    )
    assert torch.equal(per_row.token, whole.token)


def test_greedy() -> None:
    """Catches a division by 0, and a logp at the temperature limit (0) instead of at temperature 1."""
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    logits[3, 7] = logits[3, 4] = 9.0  # a tie goes to the first
    logits[5, :29] = -math.inf
    out = draw(logits, temperature=0.0, top_k=3, top_p=0.5)
    log_p = logits.log_softmax(-1)
    assert torch.equal(out.token, logits.argmax(-1)) and out.token[3] == 4 and out.token[5] == 29
    torch.testing.assert_close(out.logp, log_p.amax(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy, torch.special.entr(log_p.exp()).sum(-1), atol=1e-5, rtol=0)
    assert not out.behaviour_logp.any()
    zeros = torch.zeros(20, dtype=torch.int64)
    defined = reference(logits, zeros, zeros, zeros, torch.zeros(20), 3, 0.5, 0.0)
    assert torch.equal(defined[0], out.token) and not defined[2].any(), "the definition"
    mixed = draw(logits, temperature=torch.tensor([0.0, 1.0]).repeat(10))
    assert torch.equal(mixed.token[::2], out.token[::2])
    assert torch.equal(mixed.token[1::2], draw(logits).token[1::2])


def test_logp_and_entropy_are_of_the_whole_vocabulary_at_the_temperature() -> None:
    """Catches logp after the filters, and entropy of the filtered distribution; judged in float64."""
    logits = 4 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(2)) + 1000
    out = draw(logits, temperature=0.7, top_k=20, top_p=0.9)
    truth = (logits.double() / 0.7).log_softmax(-1)
    theirs = (logits / 0.7).log_softmax(-1)
    at = out.token[:, None]
    within_budget(out.logp, theirs.gather(1, at)[:, 0], truth.gather(1, at)[:, 0])
    within_budget(out.entropy, -(theirs.exp() * theirs).sum(-1), -(truth.exp() * truth).sum(-1))
    plain = draw(logits)
    torch.testing.assert_close(plain.logp, plain.behaviour_logp, rtol=0, atol=0)


# --- the filters ------------------------------------------------------------------------------------
def kept_probabilities(z: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The filters one token at a time, as their documentation says: top_k, then top_p, then min_p,
    renormalising each time.
    """
    p = z.double().softmax(0)
    if top_k:
        p = torch.stack([x if int((p > x).sum()) < top_k else 0 * x for x in p])
        p = p / p.sum()
    if top_p < 1:
        p = torch.stack([x if float(p[p > x].sum()) < top_p else 0 * x for x in p])
        p = p / p.sum()
    p = torch.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize("top_k", [0, 1, 3, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_filters_are_the_documented_ones(top_k: int, top_p: float, min_p: float) -> None:
    """Ties included. Catches top_p on the unfiltered distribution, ties cut by position, and a filter that
    leaves nothing.
    """
    g = torch.Generator().manual_seed(4)
    logits = torch.cat(
        [2 * torch.randn(15, 12, generator=g), torch.randint(0, 3, (15, 12), generator=g)]
    ).double()
    p = torch.stack([kept_probabilities(z, top_k, top_p, min_p) for z in logits])
    for seed in range(8):
        out = draw(logits, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p)
        torch.testing.assert_close(
            out.behaviour_logp, p.gather(1, out.token[:, None])[:, 0].log(), atol=1e-9, rtol=0
        )


def test_top_p_keeps_the_token_that_crosses_it_and_no_more() -> None:
    """Mass 1/2, 1/4, 1/4: top_p = 0.5 keeps one token, anything above keeps the tie too; catches inclusive
    sums of mass.
    """
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(200, 3)
    assert draw(logits, top_p=0.5).token.unique().tolist() == [0]
    assert draw(logits, top_p=0.501).token.unique().tolist() == [0, 1, 2]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(500, 6)
    logits[:, [1, 4]] = -math.inf
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.5}):
        out = draw(logits, **options)
        assert sorted(out.token.unique().tolist()) == [0, 2, 3, 5]
        assert out.entropy.isfinite().all() and out.behaviour_logp.allclose(torch.tensor(0.25).log())


# --- the form of the op -----------------------------------------------------------------------------
def test_a_large_vocabulary() -> None:
    """V just above Qwen's and no multiple of 4; the noise has a Gumbel's moments."""
    out = draw(torch.zeros(2, 151_937))
    torch.testing.assert_close(out.logp, torch.full((2,), -math.log(151_937)), atol=1e-5, rtol=0)
    noise = -exponential(arange(1), arange(1), arange(1), 2**20).log()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=5e-3)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=2e-2)


def test_empty_strided_and_half_inputs() -> None:
    assert all(x.shape == (0,) for x in draw(torch.empty(0, 5), top_p=0.5))
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    for a, b in zip(draw(logits.T), draw(logits.T.contiguous()), strict=True):
        torch.testing.assert_close(a, b)
    half, wide = draw(logits.bfloat16()), draw(logits.bfloat16().float())
    assert all(torch.equal(a, b) for a, b in zip(half, wide, strict=True))
    assert half.logp.dtype == torch.float32
    assert draw(logits.double()).logp.dtype == F64
    assert not draw(logits.requires_grad_()).logp.requires_grad


def test_opcheck_and_compile() -> None:
    logits, key = torch.randn(5, 9), arange(5)
    torch.library.opcheck(forward_op, (logits, key, key, key, torch.ones(5), 0, 1.0, 0.0))
    torch.library.opcheck(forward_op, (logits, key, key, key, torch.ones(5), 3, 0.9, 0.1))
    run = torch.compile(lambda x: draw(x, top_k=3), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(logits), draw(logits, top_k=3), strict=True))


def test_the_definition_reads_no_values() -> None:
    """Meta tensors have none: catches .item() and boolean indexing, which make the host wait for a GPU."""
    key = arange(5).to("meta")
    out = reference(
        torch.empty(5, 9, device="meta"), key, key, key, torch.empty(5, device="meta"), 3, 0.9, 0.1
    )
    assert all(x.shape == (5,) for x in out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature: expected 0 \(greedy\) or a positive number, got -1.0"),
        ({"temperature": torch.ones(3)}, r"temperature: expected a number or shape \(2,\), got \(3,\)"),
        ({"top_k": -1}, r"top_k: expected 0 \(keep all\) or a positive count, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a fraction in \(0, 1\], got 0.0; 1 keeps all"),
        ({"min_p": 1.5}, r"min_p: expected a fraction in \[0, 1\], got 1.5; 0 keeps all"),
        ({"sequence": arange(3)}, r"sequence: expected shape \(B=2\), got \(3,\)"),
        ({"position": torch.zeros(2)}, r"position: expected dtype int32 or int64, got float32"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        draw(torch.zeros(2, 4), **changes)
    with pytest.raises(ValueError, match="logits: expected a vocabulary of at least one token"):
        draw(torch.zeros(2, 0))
