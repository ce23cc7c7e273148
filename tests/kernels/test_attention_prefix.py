"""attention over a past: the last tokens of each sequence, on every rung, against float64 attention of the
whole sequence.
"""

from __future__ import annotations

import pytest
import torch
from support import use, within_budget
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from fastrl import ops
from fastrl.kernels import _backend
from fastrl.kernels._attention import flash as _attention_flash
from fastrl.kernels._attention import prefix as _attention_prefix
from fastrl.kernels.attention import prefix_op

NEW, PAST = [3, 0, 1, 5, 20], [4, 6, 0, 9, 33]
BACKENDS = ["reference", "cpu", "sdpa_cpu"]


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def case(H=4, K=2, E=8, dtype=torch.float32):
    """q of the new tokens; k, v of all; their ends."""
    keys = [a + b for a, b in zip(NEW, PAST, strict=True)]
    q, k, v = (
        torch.randn(n, heads, E).to(dtype) for n, heads in ((sum(NEW), H), (sum(keys), K), (sum(keys), K))
    )
    return q, k, v, ends(NEW), ends(keys)


def truth(q, k, v, cu, cu_k, scale):
    """The padded definition: every sequence to the longest, one mask of who sees whom,
    a softmax in float64.
    """
    n, m = cu.diff(), cu_k.diff()
    L, M, G = int(n.max()), int(m.max()), q.shape[1] // k.shape[1]
    rows = [x.split(lengths.tolist()) for x, lengths in ((q, n), (k, m), (v, m))]
    q, k, v = (torch.nn.utils.rnn.pad_sequence([r.double() for r in x], batch_first=True) for x in rows)
    s = torch.einsum("slhe,smhe->shlm", q, k.repeat_interleave(G, 2)) * scale
    i, j = torch.arange(L)[None, :, None] + (m - n)[:, None, None], torch.arange(M)[None, None]
    p = s.masked_fill((j > i)[:, None] | (j >= m[:, None, None])[:, None], -torch.inf).softmax(-1)
    y = torch.einsum("shlm,smhe->slhe", p, v.repeat_interleave(G, 2))
    return torch.cat([y[s, : n[s]] for s in range(len(n))])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 1)])
def test_within_the_budget_of_pytorch(backend, dtype, H, K):
    """Wrong: a mask flush with the first token (top left), a token that does not see itself, shared heads
    interleaved.
    """
    q, k, v, cu, cu_k = case(H, K, dtype=dtype)
    with use(backend, "attention"):
        y = ops.attention(q, k, v, cu, cu_seqlens_k=cu_k, scale=0.4)
    assert y.dtype == dtype
    parts = []
    for a, b, c, d in zip(
        cu[:-1].tolist(), cu[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True
    ):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        rows = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        parts.append(
            scaled_dot_product_attention(*rows, attn_mask=mask, scale=0.4, enable_gqa=True)[0].transpose(0, 1)
        )
    within_budget(y, torch.cat(parts), truth(q, k, v, cu, cu_k, 0.4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_two_pieces_is_the_prompt(backend):
    """Wrong: positions of the second piece counted from its own beginning."""
    lengths, cut = [7, 40, 12], [3, 25, 12]
    cu = ends(lengths)
    q, k, v = (torch.randn(sum(lengths), n, 8) for n in (4, 2, 2))
    late = torch.cat(
        [torch.arange(b - (n - c), b) for b, n, c in zip(cu[1:].tolist(), lengths, cut, strict=True)]
    )
    with use(backend, "attention"):
        whole = ops.attention(q, k, v, cu)
        y = ops.attention(
            q[late], k, v, ends([n - c for n, c in zip(lengths, cut, strict=True)]), cu_seqlens_k=cu
        )
    torch.testing.assert_close(y, whole[late], atol=2e-6, rtol=0)


@pytest.mark.parametrize("budget", [1, 4000])
def test_any_block_size_gives_the_same(budget, monkeypatch):
    """Wrong: a block of rows masked as if it were the first."""
    monkeypatch.setattr(_attention_prefix, "SCORES_BYTES", budget)
    q, k, v, cu, cu_k = (x.double() if x.is_floating_point() else x for x in case())
    torch.testing.assert_close(
        ops.attention(q, k, v, cu, cu_seqlens_k=cu_k, scale=0.3),
        truth(q, k, v, cu, cu_k, 0.3),
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_sees_nothing_of_its_neighbours_not_even_a_nan(backend):
    q, k, v, cu, cu_k = case()
    with use(backend, "attention"):
        clean = ops.attention(q, k, v, cu, cu_seqlens_k=cu_k)
        for x in (k, v):
            x[cu_k[3] : cu_k[4]] = torch.nan
        y = ops.attention(q, k, v, cu, cu_seqlens_k=cu_k)
    mine = slice(int(cu[3]), int(cu[4]))
    assert y[mine].isnan().all()
    assert torch.equal(
        torch.cat((y[: mine.start], y[mine.stop :])), torch.cat((clean[: mine.start], clean[mine.stop :]))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", [[], [0], [5, 3]])
def test_no_queries(backend, past):
    k = torch.randn(sum(past), 2, 8)
    with use(backend, "attention"):
        y = ops.attention(torch.empty(0, 4, 8), k, k, ends([0] * len(past)), cu_seqlens_k=ends(past))
    assert y.shape == (0, 4, 8)


@pytest.mark.parametrize("name", ["flash_attn_4", "flash_attn_2", "varlen_attn"])
def test_a_flash_library_gets_both_ends(name, monkeypatch):
    """Wrong: the queries' ends given twice, which attends to the oldest tokens; a longest sequence that
    counts queries.
    """
    seen = []

    def four(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse
    ):
        seen.append((max_seqlen_q, max_seqlen_k))
        return _attention_prefix.reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, 0), None

    def two(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, return_attn_probs):
        return *four(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=softmax_scale,
            causal=causal,
            return_lse=True,
        ), None

    def torchs(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
        return two(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=is_causal, return_attn_probs=False
        )

    adapter, function, attribute = {
        "flash_attn_4": (_attention_flash.flash4, four, "_flash_attn_fwd"),
        "flash_attn_2": (_attention_flash.flash2, two, "flash_attn_varlen_func"),
        "varlen_attn": (_attention_flash.varlen, torchs, "_flash_attention_forward"),
    }[name]
    library = type("Library", (), {attribute: staticmethod(function)})
    impl = _backend.Implementation(_attention_flash.parts(adapter(library)), None, "", "", ("cpu",), None)
    monkeypatch.setitem(_backend._table["attention"], name, impl)
    q, k, v, cu, cu_k = case()
    with ops.use_backend(name, "attention"):
        y = ops.attention(q, k, v, cu.long(), cu_seqlens_k=cu_k.long())
        ops.attention(q, k, v, cu, cu_seqlens_k=cu_k, max_seqlen=53)
    torch.testing.assert_close(y.double(), truth(q, k, v, cu, cu_k, 8**-0.5), atol=1e-6, rtol=0)
    assert seen == [(sum(NEW) + sum(PAST),) * 2, (53, 53)]


def test_opcheck():
    opcheck(prefix_op, (*case(), 0.3, 0))


def test_errors_name_the_argument():
    q, k, v, cu, cu_k = case()
    with pytest.raises(ValueError, match="cu_seqlens_k: expected non-decreasing ends from 0 to T=81"):
        ops.attention(q, k, v, cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected the ends of S=5 sequences, got 1"):
        ops.attention(q, k, v, cu, cu_seqlens_k=torch.tensor([0, 81]))
    with pytest.raises(
        ValueError, match="cu_seqlens_k: expected at least the 20 tokens of sequence 4's queries, got 10 keys"
    ):
        ops.attention(q, k, v, cu, cu_seqlens_k=torch.tensor([0, 10, 20, 40, 71, 81]))
    with pytest.raises(ValueError, match=r"v: expected shape \(T_k=81, K=2, E=8\)"):
        ops.attention(q, k, v[1:], cu, cu_seqlens_k=cu_k)
    with pytest.raises(ValueError, match="q: expected no gradient, attention with cu_seqlens_k has none"):
        ops.attention(q.requires_grad_(), k, v, cu, cu_seqlens_k=cu_k)
