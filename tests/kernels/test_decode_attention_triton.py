"""decode_attention's Triton kernels under the interpreter, through the op, against float64.  Races and bf16
products need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import paged, within_budget
from torch.library import opcheck

from fastrl import ops
from fastrl.kernels.decode_attention import forward_op

kernels = pytest.importorskip(
    "fastrl.kernels._triton.decode_attention", reason="triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set where there is no GPU"
)


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Splits of 64 tokens and blocks of 32, so that short sequences have several; two splits are added at a
    time.
    """
    monkeypatch.setattr(kernels, "SPLIT", 64)
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "CHUNK", 2)


def case(lengths, H=4, K=2, E=64, page=64, dtype=torch.float32):
    """A query for each sequence, its keys and values in pages."""
    q, k, v = (
        torch.randn(n, heads, E).to(dtype)
        for n, heads in ((len(lengths), H), (sum(lengths), K), (sum(lengths), K))
    )
    return q, *paged(k, v, lengths, page)


def run(name, q, k_cache, v_cache, table, lengths, rows=None):
    with ops.use_backend(name, "decode_attention"):
        return forward_op(q, k_cache, v_cache, table, lengths, rows, 0.3)


def exact(*args):
    return run("reference", *(x.double() if x is not None and x.is_floating_point() else x for x in args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("H, K, E", [(2, 2, 64), (4, 2, 80), (7, 1, 96), (2, 1, 128), (3, 1, 24)])
def test_as_near_to_float64_as_the_reference(H, K, E, dtype):
    """Wrong: a width or a number of heads that is no power of two read past; a split whose keys are faded
    twice; the last block of a page taken for a whole one (1, 63, 64, 65); more splits than are added at a
    time (200).
    """
    args = case([1, 63, 64, 65, 200], H, K, E, dtype=dtype)
    mine = run("triton", *args)
    assert mine.dtype == dtype
    within_budget(mine, run("reference", *args), exact(*args))


@pytest.mark.parametrize("page", [1, 12, 16, 32, 64, 96, 128, 256])
def test_any_page_size_gives_the_same_bits(page):
    """Wrong: blocks that begin where a page does; a page longer than a split, or one that is no divisor of
    it, found by the wrong number; a table of one split, which takes one launch, finished otherwise than one
    of many.
    """
    lengths = [17, 64, 130]
    q, k, v = torch.randn(3, 2, 16), torch.randn(sum(lengths), 1, 16), torch.randn(sum(lengths), 1, 16)
    first = run("triton", q, *paged(k, v, lengths, 64))
    assert torch.equal(run("triton", q, *paged(k, v, lengths, page)), first)
    for b, at in ((0, 0), (1, 17)):  # alone, in a table that holds 64 tokens
        alone = paged(k[at : at + lengths[b]], v[at : at + lengths[b]], [lengths[b]], page)
        table = alone[2][:, : max(1, -(-lengths[b] // page))]
        assert torch.equal(run("triton", q[b : b + 1], *alone[:2], table, alone[3])[0], first[b])


def test_the_same_launch_for_every_length(monkeypatch):
    """What a captured graph replays.  Wrong: a grid, a bound or a constant that was taken from the
    lengths.
    """
    monkeypatch.setattr(kernels, "SPLIT", 16)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    H, K, E, page, most = 2, 1, 16, 8, 45
    q, k, v = torch.randn(2, H, E), torch.randn(2 * 48, K, E), torch.randn(2 * 48, K, E)
    k_cache, v_cache, table, lengths = paged(k, v, [48, 48], page)
    launches = []
    for n in range(0, most + 1, 3):
        lengths.copy_(torch.tensor([n, most - n]))
        with monkeypatch.context() as patch:
            grids: list[tuple[int, ...]] = []
            for name in ("split_kernel", "combine_kernel"):
                patch.setattr(kernels, name, watched(getattr(kernels, name), grids))
            y = run("triton", q, k_cache, v_cache, table, lengths)
        launches.append(grids)
        torch.testing.assert_close(y.double(), exact(q, k_cache, v_cache, table, lengths), atol=1e-6, rtol=0)
    assert all(x == launches[0] for x in launches) and len(launches[0]) == 2


class watched:
    """A kernel whose launches are written down: the grid and every argument that is not a tensor."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen.append((grid, *(x for x in args if not isinstance(x, torch.Tensor)), *options.items()))
            return self.kernel[grid](*args, **options)

        return launch


def test_rows_shared_pages_and_lengths_of_zero():
    """Wrong: rows ignored; a free slot's softmax over nothing;
    a row of the table read where the length is 0.
    """
    _, k_cache, v_cache, table, _ = case([100, 70], E=16, page=16)
    rows = torch.tensor([1, 0, 1, 1, 0])
    table = torch.cat((table, table[:1]))
    table[2, 4:] = 12345
    queries, lengths = torch.randn(5, 4, 16), torch.tensor([70, 0, 1, 33, 100], dtype=torch.int32)
    for index in (rows, torch.where(rows == 0, 2, 1).int()):  # rows 0 and 2 share their first pages
        lengths[4] = 64 if index.dtype == torch.int32 else 100
        y = run("triton", queries, k_cache, v_cache, table, lengths, index)
        torch.testing.assert_close(
            y.double(), exact(queries, k_cache, v_cache, table, lengths, index), atol=1e-6, rtol=0
        )
        assert (y[1] == 0).all()


def test_what_lies_past_a_length_does_not_matter_not_even_nan():
    """Wrong: keys of an unused slot multiplied by 0; a page that no length reaches looked up, which on a GPU
    reads anywhere.
    """
    q, k_cache, v_cache, table, lengths = case([1, 40, 64, 90], E=16, page=16)
    before = run("triton", q, k_cache, v_cache, table, lengths)
    caches = [torch.where(c == 1e4, torch.nan, c) for c in (k_cache, v_cache)]
    table = torch.where(table < 0, 2**31 - 1, table)
    assert before.isfinite().all()
    assert torch.equal(run("triton", q, *caches, table, lengths), before)


def test_a_query_has_its_own_bits():
    """Wrong: a result that depends on the place in the batch or on the neighbours' lengths."""
    q, k_cache, v_cache, table, lengths = case([130, 5, 64, 99], E=16, page=16)
    y = run("triton", q, k_cache, v_cache, table, lengths)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(run("triton", q[order], k_cache, v_cache, table[order], lengths[order]), y[order])
    assert torch.equal(run("triton", q[3:], k_cache, v_cache, table[3:, :7], lengths[3:])[0], y[3])


def test_views_far_rows_and_no_queries():
    """Wrong: strides of a contiguous q or table assumed; offsets in int32.  The pages between are never
    touched.
    """
    q, k_cache, v_cache, table, lengths = case([20, 30], E=16, page=16)
    want = run("triton", q, k_cache, v_cache, table, lengths)
    fused = torch.zeros(2, 9, 16)
    fused[:, 2:6] = q
    assert torch.equal(run("triton", fused[:, 2:6], k_cache, v_cache, table.T.contiguous().T, lengths), want)
    slab = torch.empty(2**22 + 8, 16, 2, 16, dtype=torch.float16)
    near = torch.randn(2, 16, 2, 16).half()
    slab[0], slab[2**22 + 1] = near
    tables = [torch.tensor([[0, far]], dtype=torch.int32) for far in (1, 2**22 + 1)]
    results = [
        run("triton", q[:1].half(), c, c, t, lengths[1:]) for c, t in zip((near, slab), tables, strict=True)
    ]
    assert torch.equal(*results)
    assert run("triton", q[:0], k_cache, v_cache, table[:0], lengths[:0]).shape == (0, 4, 16)


def test_opcheck():
    q, *rest = case([3, 4], H=2, K=1, E=16, page=16)
    opcheck(forward_op, (q, *rest, None, 0.3))
