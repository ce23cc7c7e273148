"""decode_attention's Triton kernel on a GPU: against float64, in a captured graph, the same bits, no waiting;
and attention over a past.
"""

from __future__ import annotations

import pytest
import torch
from support import no_waiting, use, within_budget

from fastrl import ops
from fastrl.kernels._backend import order
from fastrl.kernels._triton.decode_attention import SPLIT
from fastrl.kernels.decode_attention import forward_op

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODELS = [(14, 2, 64), (16, 8, 128), (8, 8, 80), (32, 8, 96)]


def case(lengths, H, K, E, page=64, dtype=torch.bfloat16, N=None):
    """Queries, caches whose unused slots are NaN, a shuffled table whose unused entries lie outside,
    lengths.
    """
    B, N = len(lengths), N or max(1, -(-max(lengths) // page))
    q = torch.randn(B, H, E, device="cuda").to(dtype)
    k, v = (torch.randn(B * N, page, K, E, device="cuda").to(dtype) for _ in range(2))
    table = torch.randperm(B * N, device="cuda").view(B, N).int()
    ends = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    slot = torch.arange(N * page, device="cuda").view(1, N, page).expand(B, N, page)
    unused = torch.zeros(B * N, page, dtype=torch.bool, device="cuda")
    unused[table.flatten().long()] = (slot >= ends[:, None, None]).flatten(0, 1)
    for cache in (k, v):
        cache[unused] = torch.nan
    table[torch.arange(N, device="cuda") * page >= ends[:, None]] = 2**31 - 1
    return q, k, v, table, ends


def run(name, q, k_cache, v_cache, table, lengths, rows=None):
    with use(name, "decode_attention"):
        return forward_op(q, k_cache, v_cache, table, lengths, rows, q.shape[-1] ** -0.5)


def wide(args):
    return [x.double() if x.is_floating_point() else x for x in args]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 64, 256])
@pytest.mark.parametrize("H, K, E", MODELS)
def test_as_near_to_float64_as_the_reference(H, K, E, page, dtype):
    """Wrong: probabilities of a split that are rounded before they are normalised to less than the budget; a
    load that a pipeline took from the block before; NaN of unused slots.
    """
    args = case([0, 1, page - 1, page, page + 1, SPLIT, SPLIT + 1, 1000, 2047, 3000], H, K, E, page, dtype)
    within_budget(run("triton", *args), run("reference", *args), run("reference", *wide(args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_query_are_its_own(dtype):
    """Wrong: splits that are added in the order in which they finish; a result that depends on the batch, the
    table or the page.
    """
    q, k, v, table, lengths = case([5, 700, 64, 3000, 257], 14, 2, 64, 64, dtype)
    y = run("triton", q, k, v, table, lengths)
    with no_waiting():
        again = [run("triton", q, k, v, table, lengths) for _ in range(20)]
    assert all(torch.equal(x, y) for x in again)
    order = torch.tensor([3, 1, 4, 0, 2], device="cuda")
    assert torch.equal(run("triton", q[order], k, v, table, lengths[order], order), y[order])
    for b in range(5):
        assert torch.equal(run("triton", q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1])[0], y[b])
    pages = table.clamp(0, k.shape[0] - 1).long()
    quarters = (pages[:, :, None] * 4 + torch.arange(4, device="cuda")).flatten(1).int()
    small = [c.view(-1, 16, 2, 64) for c in (k, v)]
    assert torch.equal(run("triton", q, *small, quarters, lengths), y)


def test_one_graph_for_every_length():
    """Wrong: a launch constant that was true of the lengths at the time of the capture."""
    most = 4 * SPLIT
    q, k, v, table, lengths = case([most] * 8, 14, 2, 64)
    run("triton", q, k, v, table, lengths)  # compiles
    lengths.fill_(1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        y = run("triton", q, k, v, table, lengths)
    worst = 0.0
    for n in [*range(0, 200), *range(200, most + 1, 37), most]:
        lengths.copy_((torch.arange(8, device="cuda") * 131 + n) % (most + 1))
        lengths[0] = n
        graph.replay()
        worst = max(
            worst, (y.double() - run("reference", *wide((q, k, v, table)), lengths)).abs().max().item()
        )
    assert worst < 2e-2


def test_65536_queries_and_caches_beyond_2_31():
    """Wrong: queries on a grid axis that ends at 65,535; offsets in int32."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.1f}")
    q, k, v, table, lengths = case([3, 64], 2, 1, 64, N=1)
    pages = 2**31 // (64 * 64) + 8
    far = [torch.empty(pages, 64, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for cache, near in zip(far, (k, v), strict=True):
        cache[-2:] = near
    here = run("triton", q, k, v, table, lengths)
    assert torch.equal(run("triton", q, *far, table + (pages - 2), lengths), here)
    many = torch.arange(70000, device="cuda") % 2
    assert torch.equal(run("triton", q[many], k, v, table, lengths[many], many), here[many])


# --- attention over a past ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in order("attention") if n not in ("cpu", "reference")])
def test_a_rung_continues_a_prompt(name, dtype):
    """Wrong: a causal mask flush with the first token; a library that lays it otherwise than it says."""
    new, past = [300, 0, 1, 64, 129], [1000, 64, 0, 63, 257]
    cu, cu_k = (
        torch.tensor([0, *n], device="cuda").cumsum(0).int()
        for n in (new, [a + b for a, b in zip(new, past, strict=True)])
    )
    q, k, v = (
        torch.randn(n, h, 64, device="cuda").to(dtype)
        for n, h in ((sum(new), 14), (sum(new + past), 2), (sum(new + past), 2))
    )
    results = []
    for rung, cast in ((name, dtype), ("reference", dtype), ("reference", torch.float64)):
        with use(rung, "attention"):
            try:
                results.append(ops.attention(*(x.to(cast) for x in (q, k, v)), cu, cu_seqlens_k=cu_k))
            except RuntimeError as error:
                if "was asked for, but" not in str(error):
                    raise
                pytest.skip(str(error))
    ours, its, exact = results
    within_budget(ours, its, exact)
