"""decode_attention over a paged cache against packed attention of the whole sequence, on the implementations
of this machine.
"""

from __future__ import annotations

import pytest
import torch
from support import paged, use
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels import decode_attention as module
from fastrl.kernels.decode_attention import forward_op

LENGTHS = [1, 5, 8, 9, 3, 17]
H, K, E, PAGE = 4, 2, 8, 4
BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_equals_attention_of_the_whole_sequence(heads):
    """Wrong implementations: pages taken in storage order, the rest of the last page attended to, the newest
    token left out.
    """
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E, dtype=torch.float64) for n in (heads[0], heads[1], heads[1]))
    ends = torch.tensor(LENGTHS).cumsum(0)
    whole = ops.attention(q, k, v, torch.cat((torch.zeros(1), ends)).int(), scale=0.4)
    y = ops.decode_attention(q[ends - 1], *paged(k, v, LENGTHS, PAGE), scale=0.4)
    torch.testing.assert_close(y, whole[ends - 1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_dtypes(dtype, tolerance):
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E).to(dtype) for n in (H, K, K))
    ends = torch.tensor(LENGTHS).cumsum(0)
    exact = ops.attention(q.double(), k.double(), v.double(), torch.cat((torch.zeros(1), ends)).int())[
        ends - 1
    ]
    y = ops.decode_attention(q[ends - 1], *paged(k, v, LENGTHS, PAGE))
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_many_queries_of_one_sequence(backend, index):
    """Wrong: rows ignored, so that query b reads row b of the table;
    a query that sees the tokens after it.
    """
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E) for n in (H, K, K))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    whole = ops.attention(q.double(), k.double(), v.double(), starts.int())
    rows = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = torch.arange(T) - starts[rows] + 1
    order = torch.randperm(T)[:-2]
    k_cache, v_cache, table, _ = paged(k, v, LENGTHS, PAGE)
    with use(backend, "decode_attention"):
        y = ops.decode_attention(
            q[order], k_cache, v_cache, table.to(index), seen[order].to(index), rows=rows[order].to(index)
        )
    torch.testing.assert_close(y.double(), whole[order], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_past_a_length_does_not_matter_not_even_nan(backend):
    """Wrong: a tile of keys that is read to its end and weighted 0, but 0 * nan is nan; a page that no length
    reaches.
    """
    q, k, v = (torch.randn(sum(LENGTHS), n, E) for n in (H, K, K))
    k_cache, v_cache, table, lengths = paged(k, v, LENGTHS, PAGE)
    results = []
    with use(backend, "decode_attention"):
        for filler in (0.0, torch.nan, torch.inf):
            caches = [torch.where(c == 1e4, filler, c) for c in (k_cache, v_cache)]
            results.append(ops.decode_attention(q[: len(LENGTHS)], *caches, table, lengths))
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_reference_in_parts_is_the_reference(monkeypatch):
    """Wrong: lengths or rows of the first part used for every part."""
    q, k, v = (torch.randn(sum(LENGTHS), n, E, dtype=torch.float64) for n in (H, K, K))
    arguments = paged(k, v, LENGTHS, PAGE)
    rows = torch.randperm(len(LENGTHS))
    monkeypatch.setattr(module, "COPIED_BYTES", 1)
    parts = ops.decode_attention(q[: len(LENGTHS)], *arguments[:3], arguments[3][rows], rows=rows)
    monkeypatch.undo()
    expected = ops.decode_attention(q[: len(LENGTHS)], *arguments[:3], arguments[3][rows], rows=rows)
    torch.testing.assert_close(parts, expected, atol=1e-14, rtol=0)


def test_a_free_slot_gets_zeros_and_disturbs_nobody():
    """Wrong implementation: a softmax over nothing, which is nan."""
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E) for n in (H, K, K))
    cache_k, cache_v, table, lengths = paged(k, v, LENGTHS, PAGE)
    before = ops.decode_attention(q[: len(LENGTHS)], cache_k, cache_v, table, lengths)
    lengths[2] = 0
    y = ops.decode_attention(q[: len(LENGTHS)], cache_k, cache_v, table, lengths)
    assert torch.equal(y[2], torch.zeros(H, E))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], before[others])


def test_empty_batches_and_empty_sequences():
    """Wrong: an empty array, which may have no address, taken for one that was left out (rows) or that is
    missing (a cache, a table).
    """
    cache = torch.zeros(2, PAGE, K, E)
    none = torch.zeros(0, 1, dtype=torch.int32)
    assert ops.decode_attention(torch.empty(0, H, E), cache, cache, none, none[:, 0]).shape == (0, H, E)
    three, q = torch.zeros(3, dtype=torch.int32), torch.randn(3, H, E)
    for backend in BACKENDS:
        with use(backend, "decode_attention"):
            assert torch.equal(
                ops.decode_attention(q, cache, cache, three[:, None], three), torch.zeros(3, H, E)
            )
            assert torch.equal(
                ops.decode_attention(q, cache[:0], cache[:0], three[:, None], three), torch.zeros(3, H, E)
            )
            assert torch.equal(
                ops.decode_attention(q, cache, cache, torch.zeros(3, 0, dtype=torch.int32), three),
                torch.zeros(3, H, E),
            )
            assert ops.decode_attention(
                q[:0], cache, cache, three[:, None], three[:0], rows=three[:0]
            ).shape == (0, H, E)
            assert ops.decode_attention(q[:, :0], cache, cache, three[:, None], three).shape == (3, 0, E)


def test_large_scores_stay_finite():
    q, k, v = (1e4 * torch.randn(5, n, E) for n in (1, 1, 1))
    y = ops.decode_attention(q[-1:], *paged(k, v, [5], PAGE))
    assert y.isfinite().all()


def test_noncontiguous_queries():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    arguments = paged(k, v, [3, 4], PAGE)
    q = torch.randn(E, H, 2).permute(2, 1, 0)
    assert torch.equal(ops.decode_attention(q, *arguments), ops.decode_attention(q.contiguous(), *arguments))


def test_opcheck():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    arguments = paged(k, v, [3, 4], PAGE)
    opcheck(forward_op, (torch.randn(2, H, E), *arguments, None, 0.3))
    opcheck(forward_op, (torch.randn(2, H, E), *arguments, torch.tensor([1, 0]), 0.3))


def test_compiles_without_a_graph_break():
    """Wrong implementation: a check that reads the lengths while compiling."""
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    q, arguments = torch.randn(2, H, E), paged(k, v, [3, 4], PAGE)
    compiled = torch.compile(ops.decode_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, *arguments), ops.decode_attention(q, *arguments))


def test_errors_name_the_argument():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    cache_k, cache_v, table, lengths = paged(k, v, [3, 4], PAGE)
    q = torch.randn(2, H, E)
    for backend in BACKENDS:
        with use(backend, "decode_attention"):
            with pytest.raises(
                ValueError, match=r"lengths: expected at most 8 tokens \(2 pages of 4\), got 9"
            ):
                ops.decode_attention(q, cache_k, cache_v, table, lengths + 5)
            with pytest.raises(ValueError, match="lengths: expected at least 0 tokens, got -2"):
                ops.decode_attention(q, cache_k, cache_v, table, lengths - 5)
    with pytest.raises(ValueError, match=r"rows: expected shape \(B=2\)"):
        ops.decode_attention(q, cache_k, cache_v, table, lengths, rows=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="rows: expected dtype int32 or int64, got float32"):
        ops.decode_attention(q, cache_k, cache_v, table, lengths, rows=torch.zeros(2))
    with pytest.raises(ValueError, match="k_cache: expected a contiguous cache"):
        ops.decode_attention(q, cache_k.transpose(0, 1).contiguous().transpose(0, 1), cache_v, table, lengths)
    with pytest.raises(ValueError, match="q: expected no gradient, decode_attention has none"):
        ops.decode_attention(q.clone().requires_grad_(), cache_k, cache_v, table, lengths)
    with pytest.raises(ValueError, match="k_cache: expected key/value heads K that divide H=3"):
        ops.decode_attention(q[:, :3], cache_k, cache_v, table, lengths)
    with pytest.raises(ValueError, match=r"block_table: expected shape \(B=2, N\)"):
        ops.decode_attention(q, cache_k, cache_v, table[:1], lengths)
    with pytest.raises(
        ValueError, match="k_cache: expected pages of tokens and heads of some width, got page=4, E=0"
    ):
        ops.decode_attention(q[..., :0], cache_k[..., :0], cache_v[..., :0], table, lengths)
    with pytest.raises(
        ValueError, match="k_cache: expected pages of tokens and heads of some width, got page=0, E=8"
    ):
        ops.decode_attention(q, cache_k[:, :0], cache_v[:, :0], table, lengths)
    with pytest.raises(TypeError, match="v_cache: expected dtype float32"):
        ops.decode_attention(q, cache_k, cache_v.double(), table, lengths)
