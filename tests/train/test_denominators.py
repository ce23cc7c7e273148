"""What counts in the denominators of an optimizer step, and in its clip fractions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import decoder, on_policy

from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Batch
from fastrl.kernels.policy_loss import METRICS
from fastrl.parallel.world import World
from fastrl.train.objective import merge_policy
from fastrl.train.weighting import weigh


@pytest.mark.parametrize("changes", [{"entropy_coef": 0.01}, {"kl": "k3", "kl_coef": 0.01}], ids=str)
def test_either_term_alone_keeps_the_samples_without_advantage(changes):
    """Wrong implementation: samples left out although they have the gradient of the entropy, or of the KL."""
    row = replace(ALGORITHMS["grpo"], **changes)
    batch = on_policy(decoder(), row).collect(0, 0).batches[0]
    assert len(batch) == 12 and (batch.advantage == 0).any()
    assert len(on_policy(decoder(), ALGORITHMS["grpo"]).collect(0, 0).batches[0]) < 12


def batch_of(live: list[list[bool]]) -> Batch:
    mask = torch.tensor([m for row in live for m in row])
    zeros = torch.zeros(len(mask))
    return Batch(
        tokens=torch.zeros(len(mask), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *(len(row) for row in live)]).cumsum(0).to(torch.int32),
        mask=mask,
        advantage=zeros + 1,
        old_logp=zeros,
        weight=zeros,
    )


@pytest.mark.parametrize(
    ("name", "expected"), [("grpo", [1 / 2, 1 / 4]), ("luspo", [1 / 2, 1 / 2]), ("dr_grpo", [1 / 16, 1 / 16])]
)
def test_sequences_without_a_loss_token_are_in_no_denominator(name, expected):
    """Wrong implementation: means over all three sequences, one of which was filtered out whole."""
    batch = batch_of([[False, True], [False, False, False], [False, True, True]])
    weight = weigh(batch, ALGORITHMS[name], World(), max_length=8).weight
    assert weight[batch.mask].tolist() == pytest.approx([expected[0], expected[1], expected[1]])


def test_the_clip_region_is_all_that_a_bound_holds():
    """Wrong implementation: clip_region without the tokens that the cap of the dual clip holds."""
    numbers = dict.fromkeys(METRICS, 0.0) | {"tokens": 10.0}
    rates = {"clip_low": 0.1, "clip_high": 0.2, "clip_cap": 0.4}
    nothing = [0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0, torch.inf, 0.0, -torch.inf]
    row = [0.0, *(numbers | rates).values(), *nothing]
    assert merge_policy([row, row])["clip_region"] == pytest.approx(0.7)
