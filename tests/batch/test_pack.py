"""Micro-batches: everything once, nothing above the budget, few of them."""

from __future__ import annotations

import random

import pytest
import torch

from fastrl.batch.pack import micro_batches, plan
from fastrl.batch.types import Batch
from fastrl.errors import UserError


@pytest.mark.parametrize("budget", [9, 17, 64, 10_000])
def test_every_sequence_once_and_no_bin_above_the_budget(budget):
    """Wrong implementations: a bin that overflows by its last sequence, one sequence left out or twice, one
    bin per sequence.
    """
    draw = random.Random(budget)
    lengths = [draw.randint(1, 9) for _ in range(200)]
    bins = plan(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(200))
    filled = [sum(lengths[i] for i in b) for b in bins]
    assert max(filled) <= budget
    assert len(bins) <= -(-11 * sum(lengths) // (9 * budget)) + 1, (
        "first-fit decreasing stays within 11/9 of the best"
    )
    assert bins == plan(lengths, budget) and all(b == sorted(b) for b in bins)


def test_a_full_bin_is_full():
    assert plan([5, 5], 10) == [[0, 1]] and plan([5, 5], 9) == [[0], [1]] and plan([], 9) == []


def test_a_sequence_above_the_budget_is_named():
    with pytest.raises(
        UserError,
        match="--micro-tokens: a sequence of 11 tokens does not fit into 10; raise it to at least 11",
    ):
        plan([3, 11], 10)


def test_micro_batches_hold_the_batch():
    n = torch.arange(12)
    vectors = {name: n.float() for name in ("advantage", "old_logp", "weight")}
    batch = Batch(
        tokens=n, cu_seqlens=torch.tensor([0, 5, 6, 10, 12], dtype=torch.int32), mask=n > 0, **vectors
    )
    parts = list(micro_batches(batch, 6))
    assert len(parts) == 2 and sorted(t for p in parts for t in p.tokens.tolist()) == n.tolist()
    assert all(
        torch.equal(p.tokens.float(), p.weight) and p.cu_seqlens[-1] == p.tokens.numel() <= 6 for p in parts
    )
    assert next(micro_batches(batch, 12)) is batch
    assert list(micro_batches(batch.select([]), 6)) == []


@pytest.mark.parametrize("budget", [13, 20, 40])
def test_pairs_stay_together(budget):
    """Wrong implementations: a pair cut in two; its order lost; a micro-batch that starts with a rejected
    completion.
    """
    draw = random.Random(budget)
    lengths = torch.tensor([draw.randint(1, 6) for _ in range(40)])
    number = torch.arange(40).repeat_interleave(lengths)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    vectors = {name: number.float() for name in ("advantage", "old_logp", "weight")}
    seen = []
    for part in micro_batches(Batch(tokens=number, cu_seqlens=ends, mask=number > 0, **vectors), budget, 2):
        here = part.tokens[part.cu_seqlens[:-1].long()].tolist()
        assert [i + 1 for i in here[::2]] == here[1::2] and all(i % 2 == 0 for i in here[::2])
        assert part.tokens.numel() <= budget
        seen += here
    assert sorted(seen) == list(range(40))
