"""Copies of rows: their gradients added by parts, as on a CPU, and by gathers, as on a GPU."""

from __future__ import annotations

import pytest
import torch
from host_waits import CUDA, FakeCuda
from torch import Tensor

from fastrl.batch.copies import Copies, gathered, place
from fastrl.batch.transfer import fetch, send

CASES = {  # index, rank, rows of the array
    "some": ([2, 0, 2, 1, 2, 0], [0, 0, 1, 0, 2, 1], 4),
    "ranks with gaps": ([2, 0, 2, 1, 2, 0], [1, 0, 3, 2, 4, 5], 5),
    "in any order": ([0, 2, 2, 0, 1, 2], [1, 2, 0, 0, 0, 1], 3),
    "each once": ([3, 1, 0], [0, 0, 0], 4),
    "one row": ([0] * 40, list(range(40)), 1),
    "none": ([], [], 3),
}


def copies_of(name: str) -> tuple[Copies, int]:
    index, rank, rows = CASES[name]
    return Copies.of(*(torch.tensor(x, dtype=torch.int64) for x in (index, rank))), rows


def by_gathers(copies: Copies, rows: int) -> Copies:
    return Copies(copies.index, (), *copies.inverted(rows)[1:])


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_autograds_gradient(name):
    """Wrong implementations: a row without a copy that gets another's gradient; a copy counted twice; places
    of the sums that begin before the zero row.
    """
    copies, rows = copies_of(name)
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    for way in (copies, by_gathers(copies, rows)):
        assert torch.equal(way.take(x), x[copies.index])
        assert torch.autograd.gradcheck(way.take, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers_are_no_further_from_float64_than_parts(dtype):
    """Of 40 copies.  Wrong implementation: a sum in bfloat16."""
    copies, rows = copies_of("one row")
    grad = torch.randn(40, 64).to(dtype)
    truth = grad.double().sum(0, keepdim=True)
    off = [(way.add(grad, torch.Size((1, 64))).double() - truth).abs().max() for way in ways(copies, rows)]
    assert off[1] <= max(1.5 * off[0], torch.finfo(dtype).eps * truth.abs().max())


def ways(copies: Copies, rows: int) -> tuple[Copies, Copies]:
    return copies, by_gathers(copies, rows)


def test_on_a_device_the_backward_only_gathers():
    """Wrong implementations: an index_add for each part, all of them sorted; copies placed one by one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    found, rows = copies_of("some")
    x = torch.randn(rows, 3, dtype=torch.float64)
    want = torch.autograd.grad(found.take(x.requires_grad_()).square().sum(), x)[0]
    with FakeCuda() as cuda:
        (there, again), (other,) = place([found, found], rows, [torch.arange(3)], CUDA)
        y = cuda.copy(x).requires_grad_()
        there.take(y).square().sum().backward()
        assert cuda.waits == [] and cuda.sorts == []
        assert again.index.device == other.device == CUDA and there.source is not None
        assert there.index.untyped_storage().data_ptr() == other.untyped_storage().data_ptr(), "one copy"
    assert torch.allclose(y.grad, want, rtol=1e-14)
    assert place([found], rows, [], torch.device("cpu"))[0][0] is found


def test_gathers_take_any_shape():
    copies, rows = copies_of("some")
    _, table, source = copies.inverted(rows)
    grad = torch.randn(6, 2, 5)
    assert torch.equal(gathered(grad, table, source), gathered(grad.flatten(1), table, source).view(-1, 2, 5))


# --- transfer ---------------------------------------------------------------------------------------
def various() -> list[Tensor]:
    return [
        torch.arange(3),
        torch.tensor([True, False, True]),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([[1.5, 2.5], [3.5, 4.5]], dtype=torch.bfloat16),
        torch.arange(5, dtype=torch.int32).view(5, 1),
        torch.tensor(7.0, dtype=torch.float64),
        torch.arange(8).view(2, 4).T,
    ]


def test_what_is_sent_arrives_and_is_fetched():
    """Wrong implementations: parts at odd addresses; a transposed one in the order of its memory; a wait."""
    with FakeCuda() as cuda:
        sent = send(various(), CUDA)
        assert cuda.waits == [] and all(x.device == CUDA for x in sent)
        back = fetch(sent)
        assert len(cuda.waits) == 1
    for x, there, y in zip(various(), sent, back, strict=True):
        assert x.dtype == there.dtype == y.dtype
        assert torch.equal(x, there) and torch.equal(x, y)


def test_a_buffer_is_not_kept_for_the_next_copy():
    """Wrong implementation: one pinned buffer, filled again while the copy before is on its way."""
    with FakeCuda() as cuda:
        first = send([torch.zeros(4)], CUDA)[0]
        second = send([torch.ones(4)], CUDA)[0]
        assert cuda.waits == []
    assert first.tolist() == [0.0] * 4 and second.tolist() == [1.0] * 4


def test_on_a_cpu_nothing_is_copied():
    some = various()
    assert all(a is b for a, b in zip(send(some, torch.device("cpu")), some, strict=True))
    assert all(a is b for a, b in zip(fetch(some), some, strict=True)) and fetch([]) == []
