"""How rows are cut into chunks of logits: within the budget, balanced on CUDA, as ever on CPU, and what the
CUDA policy saves, on CPU tensors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastrl import ops
from fastrl.bench.timing import peak_bytes
from fastrl.kernels import _chunks
from fastrl.kernels._chunks import chunk_rows, logits_budget, share_of, spans
from fastrl.kernels.linear_loss import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
MEMORY = {"H200": 150_110_011_392, "H100": 84_978_368_512, "24 GB": 25_393_692_672, "8 GB": 8_361_017_344}
TOKENS = (0, 1, 127, 128, 129, 3533, 8192, 15_000, 65_537)


def sizes(parts):
    return [s.stop - s.start for s in parts]


@pytest.fixture
def as_cuda(monkeypatch):
    """CPU tensors are cut, padded and summed as CUDA tensors are."""
    monkeypatch.setitem(_chunks.POLICIES, "cpu", _chunks.POLICIES["cuda"])


# --- the plan ---------------------------------------------------------------------------------------
def test_the_budget_is_a_sixteenth_of_the_memory_in_steps():
    """Wrong: what is free at the moment; a budget that moves with the few MiB a driver keeps."""
    assert [share_of(MEMORY[n]) / GIB for n in MEMORY] == [8.5, 4.75, 1.25, 0.25]
    assert share_of(MEMORY["H100"] - (1 << 26)) == share_of(MEMORY["H100"])


def test_the_budget_of_a_device_is_asked_for_once_and_is_a_constant_when_compiled(monkeypatch):
    memory = type("Properties", (), {"total_memory": MEMORY["H200"]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert logits_budget(CUDA) == 8.5 * GIB and logits_budget(CUDA, 77) == 77
    assert logits_budget(CUDA, None, 5) == 5 and logits_budget(CUDA, 77, 5) == 77

    def rows(x):
        return x + chunk_rows(151_936, 4, CUDA)

    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 8.5 * GIB // (151_936 * 4) == 15_017


@pytest.mark.parametrize("V, itemsize", [(151_936, 4), (50_257, 2), (7, 4)])
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("full_last", [False, True])
def test_chunks_cover_every_row_once_within_the_budget_and_are_balanced(name, V, itemsize, full_last):
    """Wrong: 3533 + 3533 + 1126 rows; a padded row that is counted without its padding."""
    budget = share_of(MEMORY[name])
    most = chunk_rows(V, itemsize, CUDA, budget)
    for N in TOKENS:
        parts = spans(N, most, CUDA, full_last=full_last)
        assert [r for s in parts for r in (s.start, s.stop)] == [0, *_joints(parts), N][: 2 * len(parts)]
        assert max(sizes(parts), default=0) * (-(-V // 16) * 16) * itemsize <= budget
        assert all(n % 128 == 0 for n in sizes(parts)[:-1])
        rest = sizes(parts)[:-1] if full_last and len(parts) > 1 else sizes(parts)
        assert max(rest, default=0) - min(rest, default=0) <= 2 * 128
        assert len(parts) == (-(-N // (most // 128 * 128)) if most < N else min(N, 1))  # as few as may be


def _joints(parts):
    return [r for a in parts[1:] for r in (a.start, a.start)]


def test_a_budget_of_less_than_a_tile_still_gives_chunks():
    for most in (1, 5, 127):
        assert set(sizes(spans(300, most, CUDA))[:-1]) == {most}
        assert sum(sizes(spans(300, most, CUDA, full_last=True))) == 300


def test_8192_tokens_are_one_chunk_on_80_and_on_141_gigabytes():
    """The sizes of docs/ops.md: linear_loss at 8192 x 151,936."""
    for name, expected in (("H200", [8192]), ("H100", [8192]), ("24 GB", [2048] * 4)):
        assert sizes(spans(8192, chunk_rows(151_936, 4, CUDA, share_of(MEMORY[name])), CUDA)) == expected
    most = chunk_rows(151_936, 4, CUDA, share_of(MEMORY["H200"]))
    assert sizes(spans(20_000, most, CUDA)) == [10_112, 9888]
    assert sizes(spans(20_000, most, CUDA, full_last=True)) == [5120, 14_880]


@pytest.mark.parametrize("V, itemsize", [(151_936, 4), (32_000, 4), (1000, 2), (7, 8)])
def test_on_cpu_chunks_are_what_they_were(V, itemsize):
    """64 MiB; half of it or 128 rows; all of one size but the last.  Other chunks are other bits."""
    most = (1 << 26) // (V * itemsize)
    assert chunk_rows(V, itemsize, CPU) == max(1, min(most, max(most // 2, 128)))
    assert chunk_rows(V, itemsize, CPU, 5 * V * itemsize) == 5
    for N, most, last in itertools.product(TOKENS, (3, 1000), (False, True)):
        assert spans(N, most, CPU, full_last=last) == [slice(a, min(a + most, N)) for a in range(0, N, most)]


# --- what the policy of CUDA saves ------------------------------------------------------------------
def call(T=700, V=144, D=8, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D).to(dtype).requires_grad_() for n in (T, V))
    return hidden, weight, torch.randint(V, (T,))


def loss(logp, entropy, rows):
    return (logp.exp() * (1 + rows % 3)).sum()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [128, 300, 700], ids="rows{}".format)
def test_values_and_gradients_are_those_of_float64(as_cuda, level, rows):
    """Wrong: the first chunk's gradient of the weight dropped or doubled; chunks of a sequence-level loss
    whose gradients are added for other rows than theirs when the last one comes first.
    """
    hidden, weight, y = call()
    value, _ = ops.linear_loss(hidden, weight, y, loss, level=level, logits_bytes=rows * 144 * 4)
    grads = torch.autograd.grad(2.5 * value, [hidden, weight])
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    every = torch.ones(700, dtype=torch.bool)
    true = reference(*leaves, y, loss, every, None, torch.ones(700), False)
    torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(2.5 * true, leaves), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    again, _ = ops.linear_loss(hidden, weight, y, loss, level=level, logits_bytes=rows * 144 * 4)
    assert torch.equal(again, value)
    assert torch.equal(torch.autograd.grad(2.5 * again, weight)[0], grads[1])


@pytest.mark.parametrize("level, fourth", [("token", 0), ("sequence", 512)])
def test_of_a_sequence_level_loss_only_the_rows_beyond_the_budget_are_recomputed(as_cuda, level, fourth):
    """Wrong: a whole fourth product as soon as one row does not fit."""
    hidden, weight, y = call()
    with FlopCounterMode(display=False) as counter:
        ops.linear_loss(hidden, weight, y, loss, level=level, logits_bytes=256 * 144 * 4)
    assert counter.get_total_flops() == 2 * 144 * 8 * (3 * 700 + fourth)


@pytest.mark.parametrize("rows", [128, 512, 1024])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_peak_is_the_budget_and_the_gradients(as_cuda, level, rows):
    """Wrong: two chunks alive at once; a zeroed gradient beside the one that the first chunk writes."""
    T, V, D = 1024, 4096, 8
    hidden, weight, y = call(T, V, D)
    budget = rows * V * 4

    def run():
        ops.linear_loss(hidden, weight, y, loss, level=level, logits_bytes=budget)

    run()
    gradients = (V + T) * D * 4
    assert budget <= peak_bytes(run, CPU) <= 1.05 * (budget + 2 * gradients)


def test_one_chunk_writes_the_gradient_of_the_weight_in_its_own_dtype(as_cuda):
    """Wrong: zeros, an addition and a cast, 14 bytes an element for 2."""
    hidden, weight, y = call(dtype=torch.bfloat16)
    saved = {}
    for rows in (128, 700):
        value, _ = ops.linear_loss(hidden, weight, y, loss, logits_bytes=rows * 144 * 4)
        saved[rows] = value.grad_fn.saved_tensors[1].dtype
    assert saved == {128: torch.float32, 700: torch.bfloat16}


def test_an_upstream_gradient_is_not_rounded_to_the_dtype_of_the_weight():
    """Wrong: 1/3 in bfloat16 is off by 0.2%, and all gradients with it."""
    hidden, weight, y = call(dtype=torch.bfloat16)
    value, _ = ops.linear_loss(hidden, weight, y, loss)
    third = torch.autograd.grad(value, hidden, torch.tensor(1 / 3), retain_graph=True)[0].double()
    once = torch.autograd.grad(value, hidden)[0].double()
    assert ((third / once - 1 / 3).mean() * 3).abs() < 2e-4


@pytest.mark.parametrize("op", [ops.linear_logp, ops.linear_cross_entropy])
def test_the_other_ops_of_the_head_are_cut_the_same_way(as_cuda, op):
    hidden, weight, y = call()
    results = []
    for rows in (128, 300, 700):
        out = op(hidden, weight, y, logits_bytes=rows * 144 * 4)
        value = out.logp.exp().sum() if isinstance(out, tuple) else out
        results.append((value, *torch.autograd.grad(value, [hidden, weight])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
