"""decode_attention's C++ kernel on every instruction set this processor has.  Without fastrl._C: skipped,
visibly.
"""

from __future__ import annotations

import pytest
import torch
from support import paged, within_budget

from fastrl import ops
from fastrl.kernels._backend import backend, extension
from fastrl.kernels.decode_attention import forward_op

C = extension()
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)
LENGTHS = [1, 63, 64, 65, 130, 17, 200]


def case(H=4, K=2, E=32, dtype=torch.float32, lengths=LENGTHS, page=64):
    """A query for each sequence, its keys and values in pages."""
    q, k, v = (
        torch.randn(n, heads, E).to(dtype)
        for n, heads in ((len(lengths), H), (sum(lengths), K), (sum(lengths), K))
    )
    return q, *paged(k, v, lengths, page)


def run(name, q, k_cache, v_cache, table, lengths, rows=None, scale=0.3):
    with ops.use_backend(name, "decode_attention"):
        return forward_op(q, k_cache, v_cache, table, lengths, rows, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "H, K, E", [(4, 2, 32), (8, 2, 64), (3, 3, 7), (7, 1, 80), (14, 2, 40), (2, 1, 1), (10, 2, 129)]
)
def test_as_near_to_float64_as_the_reference(isa, H, K, E, dtype):
    """Wrong: a tail of the width or of a tile of keys that is dropped or read past; query heads of an odd
    group left out; the output of a block that is not faded when a later block has a larger score.
    """
    args = case(H, K, E, dtype)
    exact = run("reference", *(x.double() if x.is_floating_point() else x for x in args))
    mine = run("cpu", *args)
    assert mine.dtype == dtype
    within_budget(mine, run("reference", *args), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_query_are_its_own(isa, threads, dtype):
    """The batch invariance that exact sampling stands on.  Wrong: blocks that begin where a page does or that
    are as many as there are threads, a sum whose order depends on the place in the batch, several queries of
    a sequence taken together.
    """
    H, K, E, T = 6, 2, 48, 300
    q, k, v = (torch.randn(T, n, E).to(dtype) for n in (H, K, K))
    alone = []
    k_cache, v_cache, table, _ = paged(k, v, [T], 64)
    for t in range(T):
        alone.append(
            run("cpu", q[t : t + 1], k_cache, v_cache, table, torch.tensor([t + 1], dtype=torch.int32))
        )
    alone = torch.cat(alone)
    order = torch.randperm(T)
    for n, page in ((1, 64), (3, 16), (2, 1), (2, 128), (2, 12)):
        threads(n)
        # ours is the second
        k_cache, v_cache, table, _ = paged(torch.cat((v, k)), torch.cat((k, v)), [T, T], page)
        rows = torch.ones(T, dtype=torch.int64)
        together = run("cpu", q[order], k_cache, v_cache, table, (order + 1).int(), rows)
        assert torch.equal(together, alone[order]), (n, page)


def test_lengths_of_zero_and_no_queries(isa):
    """Wrong: a division by the sum over no keys; a page looked up where there is none."""
    q, k_cache, v_cache, table, lengths = case()
    before = run("cpu", q, k_cache, v_cache, table, lengths)
    lengths[2], table[2] = 0, -1
    y = run("cpu", q, k_cache, v_cache, table, lengths)
    assert (y[2] == 0).all() and torch.equal(y[[0, 1, 3, 4, 5, 6]], before[[0, 1, 3, 4, 5, 6]])
    assert run("cpu", q[:0], k_cache, v_cache, table[:0], lengths[:0]).shape == (0, 4, 32)


def test_nan_stays_with_its_query(isa):
    """Wrong: a maximum that swallows NaN and with it the warning; a neighbour that catches it."""
    q, k_cache, v_cache, table, lengths = case()
    k_cache[table[3, 0], 5] = torch.nan
    y = run("cpu", q, k_cache, v_cache, table, lengths)
    assert y[3].isnan().all() and y[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_far_and_large_scores(isa):
    """Wrong: exp of a score without its maximum; the maximum of the last block only."""
    q, k_cache, v_cache, table, lengths = case()
    k_cache[table[6, 0], 0] = 50 * q[6, ::2]  # the first key outshines all
    y = run("cpu", 10 * q, k_cache, v_cache, table, lengths)
    exact = run(
        "reference",
        *(x.double() if x.is_floating_point() else x for x in (10 * q, k_cache, v_cache, table, lengths)),
    )
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)


@needs_c
def test_views_of_a_fused_projection():
    """Wrong: strides of a contiguous q or table assumed; a width of which no row is contiguous."""
    q, k_cache, v_cache, table, lengths = case()
    want = run("cpu", q, k_cache, v_cache, table, lengths)
    fused = torch.zeros(q.shape[0], 9, 32)
    fused[:, 2:6] = q
    wide = torch.zeros(table.shape[0], 20, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    assert torch.equal(run("cpu", fused[:, 2:6], k_cache, v_cache, wide[:, : table.shape[1]], lengths), want)
    assert torch.equal(
        run(
            "cpu",
            q.transpose(0, 2).contiguous().transpose(0, 2),
            k_cache,
            v_cache,
            table.T.contiguous().T,
            lengths,
        ),
        want,
    )


@needs_c
def test_offsets_beyond_2_to_the_31():
    """Wrong: 32-bit offsets of a page.  The pages between are never touched."""
    q, k, v = (
        torch.randn(1, 2, 32).bfloat16(),
        torch.randn(70, 1, 32).bfloat16(),
        torch.randn(70, 1, 32).bfloat16(),
    )
    slab = torch.empty(2**20 + 8, 64, 1, 32, dtype=torch.bfloat16)
    near = [torch.zeros(2, 64, 1, 32, dtype=torch.bfloat16) for _ in range(2)]
    for cache, x in zip(near, (k, v), strict=True):
        cache.view(-1, 1, 32)[:70] = x
        slab[2**20 + 1] = cache[1]
        slab[0] = cache[0]
        far = run(
            "cpu",
            q,
            slab,
            slab,
            torch.tensor([[0, 2**20 + 1]], dtype=torch.int32),
            torch.tensor([70], dtype=torch.int32),
        )
        here = run(
            "cpu",
            q,
            cache,
            cache,
            torch.tensor([[0, 1]], dtype=torch.int32),
            torch.tensor([70], dtype=torch.int32),
        )
        assert torch.equal(far, here)


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs."""
    assert backend("cpu")["decode_attention"] == "cpu"


@needs_c
def test_a_page_or_a_row_that_is_not_there_is_an_error_not_a_read():
    q, k_cache, v_cache, table, lengths = case()
    rows = torch.arange(7)
    with pytest.raises(ValueError, match=r"rows: expected rows of block_table, in \[0, 7\), got 7"):
        run("cpu", q, k_cache, v_cache, table, lengths, rows + 1)
    for page in (-1, k_cache.shape[0]):
        spoiled = table.clone()
        spoiled[4, 2] = page
        with pytest.raises(
            ValueError,
            match=rf"block_table: expected pages in \[0, {k_cache.shape[0]}\) where a length reaches, "
            rf"got {page}",
        ):
            run("cpu", q, k_cache, v_cache, spoiled, lengths)


@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"H": 3}, "H: expected a multiple of K=2, got 3"),
        ({"page": 0}, "E, page: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"q": 0}, "y, q, lengths: expected addresses, got 0"),
        ({"k_cache": 0}, "k_cache, v_cache: expected addresses, got 0"),
        ({"table": 0}, "block_table: expected an address, got 0"),
        ({"pages": -1}, "B, R, N, H, pages: expected at least 0, got -1"),
        ({"H": -2}, "B, R, N, H, pages: expected at least 0, got -2"),
        ({"R": 2}, "lengths: expected one of each row of block_table, got 1"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    length = torch.zeros(1, dtype=torch.int32)
    given = {
        "y": 8,
        "q": 8,
        "q_token": 4,
        "q_head": 4,
        "code": 0,
        "k_cache": 8,
        "v_cache": 8,
        "table": 8,
        "stride": 1,
    }
    given |= {
        "lengths": length.data_ptr(),
        "rows": 0,
        "scale": 1.0,
        "B": 1,
        "R": 1,
        "N": 1,
        "H": 4,
        "K": 2,
        "E": 4,
        "pages": 1,
        "page": 4,
    }
    with pytest.raises(ValueError, match=message):
        C.decode_attention_cpu(*(given | {"threads": 1} | changes).values())
