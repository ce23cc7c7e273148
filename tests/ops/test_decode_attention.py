"""decode_attention over a paged cache against packed attention of the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels.decode_attention import forward_op

LENGTHS = [1, 5, 8, 9, 3, 17]
H, K, E, PAGE = 4, 2, 8, 4


def paged(k, v, lengths, *, dtype=None):
    """Packed keys and values spread over shuffled pages; unused table entries are out of range, unused rows hold large numbers."""
    pages = [-(-n // PAGE) for n in lengths]
    free = torch.randperm(sum(pages) + 3).tolist()
    table = torch.full((len(lengths), max(pages) + 1), -7, dtype=torch.int32)
    caches = [torch.full((len(free), PAGE, x.shape[1], x.shape[2]), 1e4, dtype=dtype or x.dtype) for x in (k, v)]
    start = 0
    for i, n in enumerate(lengths):
        for p in range(pages[i]):
            table[i, p] = free.pop()
            rows = slice(start + p * PAGE, start + min(n, (p + 1) * PAGE))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[table[i, p], : rows.stop - rows.start] = x[rows]
        start += n
    return *caches, table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_equals_attention_of_the_whole_sequence(heads):
    """Wrong implementations: pages taken in storage order, the rest of the last page attended to, the newest token left out."""
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E, dtype=torch.float64) for n in (heads[0], heads[1], heads[1]))
    ends = torch.tensor(LENGTHS).cumsum(0)
    whole = ops.attention(q, k, v, torch.cat((torch.zeros(1), ends)).int(), scale=0.4)
    y = ops.decode_attention(q[ends - 1], *paged(k, v, LENGTHS), scale=0.4)
    torch.testing.assert_close(y, whole[ends - 1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, tolerance):
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E).to(dtype) for n in (H, K, K))
    ends = torch.tensor(LENGTHS).cumsum(0)
    exact = ops.attention(q.double(), k.double(), v.double(), torch.cat((torch.zeros(1), ends)).int())[ends - 1]
    y = ops.decode_attention(q[ends - 1], *paged(k, v, LENGTHS))
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= tolerance


def test_a_free_slot_gets_zeros_and_disturbs_nobody():
    """Wrong implementation: a softmax over nothing, which is nan."""
    T = sum(LENGTHS)
    q, k, v = (torch.randn(T, n, E) for n in (H, K, K))
    cache_k, cache_v, table, lengths = paged(k, v, LENGTHS)
    before = ops.decode_attention(q[: len(LENGTHS)], cache_k, cache_v, table, lengths)
    lengths[2] = 0
    y = ops.decode_attention(q[: len(LENGTHS)], cache_k, cache_v, table, lengths)
    assert torch.equal(y[2], torch.zeros(H, E))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], before[others])


def test_empty_batches_and_empty_sequences():
    cache = torch.zeros(2, PAGE, K, E)
    none = torch.zeros(0, 1, dtype=torch.int32)
    assert ops.decode_attention(torch.empty(0, H, E), cache, cache, none, none[:, 0]).shape == (0, H, E)
    y = ops.decode_attention(torch.randn(3, H, E), cache, cache, torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    assert torch.equal(y, torch.zeros(3, H, E))


def test_large_scores_stay_finite():
    q, k, v = (1e4 * torch.randn(5, n, E) for n in (1, 1, 1))
    y = ops.decode_attention(q[-1:], *paged(k, v, [5]))
    assert y.isfinite().all()


def test_noncontiguous_queries():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    arguments = paged(k, v, [3, 4])
    q = torch.randn(E, H, 2).permute(2, 1, 0)
    assert torch.equal(ops.decode_attention(q, *arguments), ops.decode_attention(q.contiguous(), *arguments))


def test_opcheck():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    opcheck(forward_op, (torch.randn(2, H, E), *paged(k, v, [3, 4]), 0.3))


def test_compiles_without_a_graph_break():
    """Wrong implementation: a check that reads the lengths while compiling."""
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    q, arguments = torch.randn(2, H, E), paged(k, v, [3, 4])
    compiled = torch.compile(ops.decode_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, *arguments), ops.decode_attention(q, *arguments))


def test_errors_name_the_argument():
    k, v = torch.randn(7, K, E), torch.randn(7, K, E)
    cache_k, cache_v, table, lengths = paged(k, v, [3, 4])
    q = torch.randn(2, H, E)
    with pytest.raises(ValueError, match="lengths: expected at most 8 tokens"):
        ops.decode_attention(q, cache_k, cache_v, table, lengths + 5)
    with pytest.raises(ValueError, match="k_cache: expected key/value heads K that divide H=3"):
        ops.decode_attention(q[:, :3], cache_k, cache_v, table, lengths)
    with pytest.raises(ValueError, match=r"block_table: expected shape \(B=2, N\)"):
        ops.decode_attention(q, cache_k, cache_v, table[:1], lengths)
    with pytest.raises(TypeError, match="v_cache: expected dtype float32"):
        ops.decode_attention(q, cache_k, cache_v.double(), table, lengths)
