"""Where batches come from: a pure function of the step, in whole groups, with the denominators of the
optimizer step.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from runs import (
    BUDGET,
    DEMONSTRATIONS,
    GROUP,
    PROMPTS,
    SCORES,
    decoder,
    demonstrations,
    make_batch,
    on_policy,
    rescore,
)

from fastrl.algorithms import ALGORITHMS
from fastrl.config import Grpo, Sampling
from fastrl.errors import UserError
from fastrl.methods.grpo.options import check_rollouts
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored
from fastrl.sampler import Sampler
from fastrl.train.source import order


# --- order ------------------------------------------------------------------------------------------
def test_order_is_an_endless_row_of_permutations():
    """Wrong implementations: sampling with replacement; every epoch the same; a step that depends on the
    steps before it.
    """
    drawn = order(7, 3, 0, 21)
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert order(7, 3, 5, 10) == drawn[5:15] and order(7, 3, 20, 1) == drawn[20:]
    assert order(7, 4, 0, 7) != drawn[:7]


# --- demonstrations ---------------------------------------------------------------------------------
def test_demonstrations_are_packed_with_their_masks():
    """Wrong implementations: loss on the prompt; one weight per sequence instead of one per token of the
    step.
    """
    batch = demonstrations().collect(4, 0).batches[0]
    rows = [DEMONSTRATIONS[i] for i in order(3, 0, 12, 3)]
    assert batch.tokens.tolist() == [t for r in rows for t in r.tokens] and batch.mask.tolist() == [
        m for r in rows for m in r.mask
    ]
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor([len(r.tokens) for r in rows]).cumsum(0).tolist()]
    assert batch.weight[batch.mask].tolist() == pytest.approx([1 / 7] * 7) and (batch.advantage == 1).all()


def test_the_processes_share_a_step():
    """Wrong implementations: every process trains on everything; denominators of its own share."""
    whole = make_batch("sft", decoder())
    shares = [demonstrations(_Half(rank, 2)).collect(0, 0).batches[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([s.tokens for s in shares]), whole.tokens)
    assert [len(s) for s in shares] == [1, 2]


class _Half(World):
    """A process of several that hears nothing of the others."""

    def _reduce(self, values, op):
        return list(values)

    def gather(self, rows):
        return rows


# --- rollouts ---------------------------------------------------------------------------------------
def test_a_step_is_a_function_of_its_number():
    """Wrong implementations: prompts from a stateful iterator; noise that a resumed run or another process
    would not draw again.
    """
    model = decoder()
    a, b = (on_policy(model, ALGORITHMS["rloo"], scores=range(12)).collect(5, 0).batches[0] for _ in range(2))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.old_logp, b.old_logp)
    assert not torch.equal(
        a.tokens, on_policy(model, ALGORITHMS["rloo"], scores=range(12)).collect(6, 0).batches[0].tokens
    )
    halves = [
        on_policy(model, ALGORITHMS["rloo"], scores=range(12), world=_Half(r, 2)).collect(5, 0).batches[0]
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat([h.tokens for h in halves]), a.tokens) and [len(h) for h in halves] == [
        GROUP,
        2 * GROUP,
    ]


def test_no_two_samples_of_a_run_have_one_number(monkeypatch):
    """Wrong implementations: numbers that begin again at every step, or in every process: the same noise for
    other samples.
    """
    numbers, real = [], Sampler.generate

    def generate(self, prompts, params, *, sequence_offset, weight_version, **_):
        numbers.extend(range(sequence_offset, sequence_offset + len(prompts) * params.n))
        assert weight_version == 17
        return real(self, prompts, params, sequence_offset=sequence_offset)

    monkeypatch.setattr(Sampler, "generate", generate)
    for step in range(3):
        for rank in (0, 1):
            on_policy(decoder(), ALGORITHMS["rloo"], world=_Half(rank, 2)).collect(step, 17)
    assert numbers == list(range(3 * 12))


def test_every_sample_has_the_advantage_of_its_own_reward():
    """Wrong implementations: rewards of one prompt on the samples of another; advantages within the batch,
    not the group.
    """
    batch = on_policy(decoder(), ALGORITHMS["dr_grpo"]).collect(0, 0).batches[0]
    reward = torch.tensor(SCORES).view(-1, GROUP)
    want = (reward - reward.mean(1, keepdim=True))[[i for i in order(3, 2, 0, 3) if i != 1]].flatten()
    assert torch.allclose(batch.advantage[batch.cu_seqlens[:-1].long()], want)
    ends = batch.cu_seqlens.tolist()
    for a, b in pairwise(ends):
        assert (batch.advantage[a:b] == batch.advantage[a]).all()
        assert (batch.old_logp[a:b] != 0).tolist() == batch.mask[a:b].tolist()


def test_minibatches_and_epochs():
    """Wrong implementations: groups cut apart; one denominator for all minibatches; prompts left out or seen
    twice in an epoch.
    """
    source = on_policy(decoder(), ALGORITHMS["dapo"], scores=range(12), minibatches=2, epochs=3)
    batches = source.collect(0, 0).batches
    assert len(batches) == 6
    for first, second in (batches[0:2], batches[2:4], batches[4:6]):
        assert sorted((len(first), len(second))) == [GROUP, 2 * GROUP]
        assert [b.weight[b.mask].sum().item() for b in (first, second)] == pytest.approx([1, 1])
    seen = [_prompts(b) for b in batches]
    assert sorted(seen[0] + seen[1]) == sorted(PROMPTS) and seen[0:2] == seen[2:4] == seen[4:6]
    halves = [
        on_policy(decoder(), ALGORITHMS["dapo"], scores=range(12), minibatches=2, world=_Half(r, 2))
        .collect(0, 0)
        .batches
        for r in (0, 1)
    ]
    assert [sorted(_prompts(a) + _prompts(b)) for a, b in zip(*halves, strict=True)] == [
        sorted(s) for s in seen[:2]
    ]


def _prompts(batch) -> list[list[int]]:
    ends = batch.cu_seqlens.tolist()
    starts = [batch.tokens[a:b][~batch.mask[a:b]].tolist() for a, b in pairwise(ends)]
    assert starts == [p for p in starts[::GROUP] for _ in range(GROUP)], "whole groups, in order"
    return starts[::GROUP]


def test_metrics_of_a_step():
    """Wrong implementations: rewards that are not applicable counted as 0; lengths with the prompt; a biased
    deviation.
    """
    scores = [1.0, 0.0, math.nan, math.nan, 2.0, 2.0, 2.0, 2.0, math.nan, math.nan, math.nan, math.nan]
    source = on_policy(decoder(eos_token_id=[3, 4, 5]), ALGORITHMS["grpo"], scores=scores)
    real, parts = source.groups.prompts.score, {"a": [1.0] * 6 + [math.nan] * 6, "b": [math.nan] * 12}
    rescore(source, lambda *given: Scored(real(*given).reward, parts, ["fine"] * 12))
    step = source.collect(0, 0)
    m = step.metrics
    assert (
        m["reward"] == pytest.approx(9 / 6)
        and m["reward_std"] == pytest.approx(0.5**0.5 / 3)
        and m["frac_reward_zero_std"] == pytest.approx(2 / 3)
    )
    assert m["a"] == 1.0 and math.isnan(m["b"]), "0 would look like a result"
    rollouts = source.groups.sampler.generate([PROMPTS[i] for i in order(3, 2, 0, 3)], source.groups.params)
    lengths = rollouts.lengths.double()
    assert (
        m["completions/mean_length"] == pytest.approx(lengths.mean().item())
        and m["rollout/tokens"] == lengths.sum()
    )
    assert (m["completions/max_length"], m["completions/min_length"]) == (
        lengths.max(),
        lengths.min(),
    ) and lengths.max() == BUDGET
    assert m["completions/clipped_ratio"] == sum(r == "length" for r in rollouts.finish_reason) / 12
    assert m["entropy"] == pytest.approx(rollouts.entropy[rollouts.completion_mask].mean().item())
    first = order(3, 2, 0, 1)[0]
    assert [s["prompt"] for s in step.samples] == [PROMPTS[first]] * 4 and {
        s["message"] for s in step.samples
    } == {"fine"}
    assert len(step.batches[0]) == 2, "only the first group has two rewards to compare"


def test_a_process_without_prompts_takes_part():
    """Wrong implementations: it skips a sum that the others wait in;
    a reward function is called for nothing.
    """
    calls: list[int] = []

    class Counting(World):
        def _reduce(self, values, op):
            calls.append(len(list(values)))
            return list(values)

        def gather(self, rows):
            calls.append(-1)
            return [*rows, "a"]

    counts = []
    for prompts in (1, 2):
        calls.clear()
        source = on_policy(decoder(), ALGORITHMS["grpo"], world=Counting(0, 2), prompts=prompts)
        real = source.groups.prompts.score

        def score(*given, real=real):
            return Scored(real(*given).reward, {"a": [1.0] * len(given[0])} if given[0] else {})

        rescore(source, score)
        step = source.collect(0, 0)
        counts.append(list(calls))
    assert counts[0] == counts[1], "the same sums in the same order, whatever the share"
    assert len(step.batches) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": Sampling(temperature=0.0)},
            "--sampling.temperature: expected a positive number, got 0; greedy samples",
        ),
        ({"group": 1}, "--group: expected at least 2 completions of a prompt, to compare them, got 1"),
        ({"minibatches": 5, "prompts": 4}, r"--minibatches: expected 1 to --prompts \(4\), got 5"),
        ({"minibatches": 0}, "--minibatches: expected 1 to"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_rollouts(Grpo(**{"model": "m"} | changes), least=ALGORITHMS["grpo"].advantage.least)
