"""Partial rollouts: what a step leaves unfinished is finished by the next, once, and trained on whole groups
at a time.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from runs import GROUP, decoder, on_policy

from fastrl.algorithms import ALGORITHMS
from fastrl.config import Grpo
from fastrl.errors import UserError
from fastrl.methods.grpo.options import check_rollouts
from fastrl.methods.grpo.partial import PartialRollouts
from fastrl.methods.grpo.rollouts import RolloutSource

LONG = {"tail": "carry", "tail_share": 0.4, "max_new_tokens": 30}


def source(**changes: object) -> RolloutSource:
    return on_policy(decoder(eos_token_id=[3, 4, 5, 6]), ALGORITHMS["rloo"], **LONG | changes)


def test_every_completion_is_trained_on_once_and_whole():
    """Wrong implementations: a group trained on before its last completion ends; the part drawn earlier lost,
    or drawn again; a completion lost; log-probs of the first part replaced by new ones.
    """
    carrying, waiting = source(), source(tail="finish")
    drawn, versions = [], Counter()
    sizes = []
    for step in range(5):
        draw = carrying.groups.sample_round(step, 0, 3, version=step)
        sizes.append(len(draw.rollouts) // GROUP)
        drawn += list(zip(draw.rollouts.sequence.tolist(), draw.rollouts.completions(), strict=True))
        assert all(r in ("stop", "length") for r in draw.rollouts.finish_reason) and draw.places == list(
            range(sizes[-1])
        )
        for row in draw.rollouts.weight_version.split(draw.rollouts.cu_seqlens.diff().tolist()):
            seen = row[row >= 0]
            assert (seen.diff() >= 0).all()
            versions[len(seen.unique())] += 1
        assert [c["id"] for _, c in draw.items] == [
            draw.items[i - i % GROUP][1]["id"] for i in range(len(draw.items))
        ]
    assert len(set(sizes)) > 1 and versions[2] > 3, "groups were held back, and finished by later weights"
    held = {s for h in carrying.groups.pending.pending for s in h.rollouts.sequence.tolist()}
    assert sorted([s for s, _ in drawn] + sorted(held)) == list(range(5 * 3 * GROUP))
    whole = {}
    for step in range(5):
        draw = waiting.groups.sample_round(step, 0, 3, version=step)
        whole |= dict(zip(draw.rollouts.sequence.tolist(), draw.rollouts.completions(), strict=True))
    assert dict(drawn) == {s: whole[s] for s, _ in drawn}, (
        "the weights did not change, so neither did what was drawn"
    )


def test_a_step_in_which_no_group_ends_is_empty():
    """Wrong implementation: an empty batch that fails."""
    carrying = source(tail_share=0.8)
    steps = [carrying.collect(step, step) for step in range(4)]
    assert any(len(s.batches[0]) == 0 for s in steps) and any(len(s.batches[0]) > 0 for s in steps)


def test_what_is_held_survives_a_checkpoint():
    """Wrong implementations: a part of the rollouts that is not kept; groups in another order."""
    carrying = source()
    carrying.collect(0, 0)
    kept, again = carrying.groups.pending, PartialRollouts(GROUP)
    assert kept.pending
    again.load_state(kept.state(), None, torch.device("cpu"))
    for a, b in zip(kept.pending, again.pending, strict=True):
        assert (
            a.number == b.number
            and a.rollouts.finish_reason == b.rollouts.finish_reason
            and a.unfinished == b.unfinished
        )
        for name in (
            "tokens",
            "cu_seqlens",
            "completion_mask",
            "logp",
            "entropy",
            "weight_version",
            "sequence",
        ):
            assert torch.equal(getattr(a.rollouts, name), getattr(b.rollouts, name)), name
    empty = PartialRollouts(GROUP)
    empty.load_state({}, None, torch.device("cpu"))
    assert empty.pending == [] and empty.unfinished() is None


@pytest.mark.parametrize("tail", ["finish", "cut"])
def test_groups_that_wait_are_not_dropped(tail):
    """Wrong implementations: a resumed run without them; completions that nobody asked for in the batch."""
    carrying = source()
    carrying.collect(0, 0)
    with pytest.raises(UserError, match=f"--tail: expected carry, because unfinished groups .*, got {tail}"):
        source(tail=tail).load_state(carrying.state())


def test_what_does_not_go_with_it_is_refused():
    config = Grpo(model="", tail="carry", refill=1)
    with pytest.raises(
        UserError,
        match="--tail: expected finish or cut with --refill, which fills the batch anyway, got carry",
    ):
        check_rollouts(config)
    with pytest.raises(UserError, match="--tail: expected finish or cut with several processes, got carry"):
        check_rollouts(Grpo(model="", tail="carry"), processes=2)
    with pytest.raises(UserError, match=r"--tail-share: expected a fraction in \(0, 1\), got 1.0"):
        check_rollouts(Grpo(model="", tail_share=1.0))
