"""Rollouts in training: how far the sampler is from the trainer, corrections, dynamic sampling, overlong
completions, several rewards.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import (
    BUDGET,
    GROUP,
    PROMPTS,
    decoder,
    drift,
    gradient,
    grpo,
    learner,
    lines,
    logp,
    on_policy,
    relative,
    rescore,
)

import fastrl.trainer
from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.correction import CORRECTIONS
from fastrl.batch.types import Rollouts
from fastrl.config import Grpo
from fastrl.errors import UserError
from fastrl.methods.grpo.groups import has_signal
from fastrl.methods.grpo.options import check_rollouts
from fastrl.methods.grpo.prompts import Scorer, load_prompts
from fastrl.methods.grpo.refill import first_useful, next_round_size
from fastrl.methods.grpo.sampling import prompt_block
from fastrl.parallel.world import World
from fastrl.rewards.functions import Scored, score, soft_overlong
from fastrl.sampler import Sampler
from fastrl.train.source import order
from fastrl.train.weighting import correct


# --- sampler against trainer --------------------------------------------------------------------------
def test_first_update_measures_the_sampler():
    """Wrong implementations: measured after the step, over masked tokens, at temperature 1, or against the
    corrected old log-prob.
    """
    model = decoder()
    batch = on_policy(model, ALGORITHMS["grpo"]).collect(0, 0).batches[0]
    fresh = gradient(learner(model, ALGORITHMS["grpo"], 20), batch)[0]
    assert (
        fresh["sampler_diff_max"] < 1e-4
        and fresh["sampler_kl"] < 1e-8
        and fresh["sampler_ess"] == pytest.approx(1, abs=1e-6)
    )
    drift(model, 0.03)
    for row in (ALGORITHMS["grpo"], replace(ALGORITHMS["grpo"], correction=CORRECTIONS["token_truncate"])):
        trained = learner(model, row, 20)
        s = (logp(model, batch) - batch.old_logp)[batch.mask].double()
        m = gradient(trained, batch)[0]
        w = s.exp()
        assert [
            m[k] for k in ("sampler_diff_mean", "sampler_diff_max", "sampler_kl", "sampler_ess")
        ] == pytest.approx(
            [
                s.abs().mean().item(),
                s.abs().max().item(),
                (w - 1 - s).mean().item(),
                (w.sum() ** 2 / w.square().sum() / len(s)).item(),
            ],
            rel=1e-4,
            abs=1e-6,
        )
    assert (
        m["correction_mean"] == pytest.approx(w.clamp(max=2).mean().item(), rel=1e-4)
        and m["correction_max"] <= 2
    )


@pytest.mark.parametrize("name", CORRECTIONS)
def test_one_pass_corrects_as_a_forward_beforehand_does(name):
    """Wrong implementations: the weights after the update in one of the two; sequences cut in two; a weight
    that is differentiated.
    """
    model = decoder()
    row = replace(ALGORITHMS["dapo"], correction=CORRECTIONS[name])
    if name == "geometric_mask":
        row = replace(row, correction=replace(CORRECTIONS[name], low=0.9, high=1.1))
    batch = on_policy(model, row).collect(0, 0).batches[0]
    drift(model, 0.02)
    trained = learner(model, row, 20)
    before = correct(batch, row.correction, logp(model, batch))
    assert before.correction[batch.mask].unique().numel() > 1 and (before.correction[~batch.mask] == 1).all()
    (a, g), (b, h) = gradient(trained, batch), gradient(trained, before)
    assert relative(g, h) < 1e-5
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_several_updates_are_corrected_by_the_weights_before_the_first():
    """Wrong implementations: a forward where nothing needs it; one per minibatch, under moved weights; the
    recorded log-prob lost.
    """
    model, asked = decoder(), []
    row = replace(ALGORITHMS["dapo"], correction=CORRECTIONS["sequence_mask"])

    def trainer(batch):
        asked.append(len(batch))
        return batch.old_logp * 0.9

    source = on_policy(model, row, minibatches=3, epochs=2)
    with pytest.raises(ValueError, match="trainer: expected a function of the batch, got None"):
        on_policy(model, row, trainer=None, minibatches=3)
    source.extra = replace(source.extra, trainer=trainer)
    batches = source.collect(0, 0).batches
    assert asked == [12] and len(batches) == 6
    for batch in batches:
        live = batch.mask
        torch.testing.assert_close(batch.old_logp[live], batch.sampler_logp[live] * 0.9)
        s = torch.where(live, batch.old_logp - batch.sampler_logp, 0)
        for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            w = s[a:b].sum().exp().item()
            assert batch.correction[a:b][live[a:b]].tolist() == pytest.approx(
                [w if w <= 3 else 0.0] * int(live[a:b].sum()), rel=1e-5
            )
    single = on_policy(model, row)
    single.extra = replace(single.extra, trainer=trainer)
    assert single.collect(0, 0).batches[0].correction is None and asked == [12]


def test_staleness_is_reported(monkeypatch):
    """Wrong implementations: prompt tokens (version -1) counted; the version of the call instead of the
    token's.
    """
    real = Sampler.generate

    def generate(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        version = done.weight_version.clone()
        version[done.completion_mask.nonzero()[:5]] -= 3
        return replace(done, weight_version=version)

    monkeypatch.setattr(Sampler, "generate", generate)
    m = on_policy(decoder(), ALGORITHMS["grpo"]).collect(0, 17).metrics
    assert m["sampler/staleness_max"] == 3 and m["sampler/staleness_mean"] == pytest.approx(
        15 / m["rollout/tokens"]
    )


# --- dynamic sampling ---------------------------------------------------------------------------------
def test_rounds_never_share_a_number():
    """Wrong implementations: rounds that continue into the next step's prompts; a step whose numbers depend
    on the rounds before.
    """
    for refill in (0, 1, 3):
        blocks = [prompt_block(step, turn, refill) for step in range(5) for turn in range(1 + refill)]
        assert blocks == list(range(5 * (1 + refill)))
    assert [next_round_size(*x) for x in ((4, 8, 8), (0, 8, 8), (7, 8, 8), (6, 16, 8))] == [8, 8, 2, 6]
    assert first_useful([False, True, True, False, True], 2) == [1, 2] and first_useful([True], 3) == [0]
    nan = math.nan
    assert has_signal(torch.tensor([1.0, 1, 1, 2, nan, nan, nan, 3, 3, nan, 0, 1]), 2).tolist() == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]


def numbered(model: Any, scores: Any, **options: Any) -> tuple[Any, list[tuple[int, int]]]:
    """A source whose rewards follow the number of the call and the prompt: and what its sampler was asked
    for.
    """
    source, calls = on_policy(model, ALGORITHMS["dapo"], **options), []
    real = source.groups.sampler.generate

    def generate(prompts, params, *, sequence_offset, weight_version, **_):
        calls.append((sequence_offset, len(prompts)))
        return real(prompts, params, sequence_offset=sequence_offset, weight_version=weight_version)

    source.groups.sampler.generate = generate

    def score(p, *rest):
        return Scored([scores(len(calls) - 1, i // GROUP, i % GROUP) for i in range(len(p))])

    rescore(source, score)
    return source, calls


def test_flat_groups_are_replaced_until_the_batch_is_full():
    """Wrong implementations: samples of one number twice; the denominator of all that was drawn; surplus
    groups trained on; rewards reported of the kept groups only, which no policy ever had.
    """
    flat = {(0, 0), (0, 2), (1, 0)}  # (round, group) without spread
    source, calls = numbered(
        decoder(), lambda turn, g, i: float(i % 2) if (turn, g) not in flat else 1.0, refill=2
    )
    step = source.collect(5, 0)
    first = 5 * 3 * 3 * GROUP  # three blocks of three prompts a step
    assert calls == [(first, 3), (first + 3 * GROUP, 3)]
    batch = step.batches[0]
    assert len(batch) == 3 * GROUP and batch.weight[batch.mask].sum().item() == pytest.approx(1)
    assert step.metrics["refill/groups"] == 6 and step.metrics["refill/kept"] == 3
    assert step.metrics["frac_reward_zero_std"] == 0.5 and step.metrics["reward"] == pytest.approx(
        (3 * 1.0 + 3 * 0.5) / 6
    )
    wanted = [order(3, 2, 45, 3)[1], *order(3, 2, 48, 3)[1:]]
    starts = batch.cu_seqlens[:-1].tolist()[::GROUP]
    assert [batch.tokens[a : a + len(PROMPTS[i])].tolist() for a, i in zip(starts, wanted, strict=True)] == [
        PROMPTS[i] for i in wanted
    ]
    again = numbered(decoder(), lambda turn, g, i: float(i % 2) if (turn, g) not in flat else 1.0, refill=2)[
        0
    ].collect(5, 0)
    assert torch.equal(again.batches[0].tokens, batch.tokens)


def test_refilling_ends():
    """Wrong implementations: a loop that a solved task never leaves; a batch of nothing that is an error;
    fewer groups refused.
    """
    source, calls = numbered(decoder(), lambda turn, g, i: 1.0, refill=2)
    step = source.collect(0, 0)
    assert len(calls) == 3 and len(step.batches[0]) == 0 and step.metrics["refill/kept"] == 0
    assert learner(decoder(), ALGORITHMS["dapo"]).update(step.batches[0], 0)["num_tokens"] == 0
    source, calls = numbered(
        decoder(), lambda turn, g, i: float(i) if (turn, g) == (1, 1) else 0.0, refill=1, minibatches=2
    )
    assert [len(b) for b in source.collect(0, 0).batches] == [GROUP, 0]


def test_joined_rollouts_and_scores_are_those_of_one_call():
    """Wrong implementations: ends that begin at 0 again; prompt numbers twice; a metric lost that only the
    second call has.
    """
    model = decoder()
    params = on_policy(model, ALGORITHMS["grpo"]).groups.params
    whole = Sampler(model).generate(PROMPTS, params)
    parts = [
        Sampler(model).generate(PROMPTS[:1], params),
        Sampler(model).generate(PROMPTS[1:], params, sequence_offset=GROUP),
    ]
    joined = Rollouts.join(parts)
    for name in (
        "tokens",
        "cu_seqlens",
        "completion_mask",
        "prompt_index",
        "prompt_lengths",
        "weight_version",
    ):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    torch.testing.assert_close(joined.logp, whole.logp)
    assert joined.finish_reason == whole.finish_reason and joined.text is None
    one = Scored([1.0], {"a": [2.0]}, [], {"x": ["y"]}, {"f": (0.5, [2.0])})
    two = Scored([3.0, math.nan], {"b": [4.0, 5.0]}, ["m", ""], {}, {"f": (0.5, [6.0, math.nan])})
    got = Scored.join([one, two])
    assert (
        str(got.reward) == "[1.0, 3.0, nan]"
        and str(got.parts) == "{'a': [2.0, nan, nan], 'b': [nan, 4.0, 5.0]}"
    )
    assert (
        got.message == ["", "m", ""]
        and got.extra == {"x": ["y", None, None]}
        and str(got.each) == "{'f': (0.5, [2.0, 6.0, nan])}"
    )


# --- length, and several rewards ----------------------------------------------------------------------
def test_soft_overlong():
    """DAPO's golden values; wrong implementations: a punishment that goes on falling, a sign, an interval off
    by one.
    """
    assert soft_overlong([10, 16, 17, 18, 20, 21], 20, 4) == [0, 0, -0.25, -0.5, -1, -1]


def test_overlong_completions():
    """Wrong implementations: shaping after the advantage; cut completions in the denominators; a mask over
    the wrong samples.
    """
    plain, shaped, filtered = (
        on_policy(decoder(eos_token_id=[3, 4, 5]), ALGORITHMS["dapo"], scores=range(12), **options)
        for options in ({}, {"overlong_buffer": 4}, {"overlong_filter": True})
    )
    rollouts = plain.groups.sampler.generate([PROMPTS[i] for i in order(3, 2, 0, 3)], plain.groups.params)
    punished = soft_overlong(rollouts.lengths.tolist(), BUDGET, 4)
    draw, step = shaped.groups.sample_round(0, 0, 3, 0), shaped.collect(0, 0)
    base = plain.groups.sample_round(0, 0, 3, 0).scored.reward
    assert draw.scored.reward == pytest.approx([a + b for a, b in zip(base, punished, strict=True)])
    assert min(punished) == -1 and step.metrics["rewards/overlong/mean"] == pytest.approx(sum(punished) / 12)
    cut = [r == "length" for r in rollouts.finish_reason]
    batch = filtered.collect(0, 0).batches[0]
    whole = [int(n) for n, c in zip(rollouts.lengths, cut, strict=True) if not c]
    assert 0 < sum(cut) < 12 and sorted(batch.live_ends.diff().tolist()) == sorted(whole)
    assert batch.weight[batch.mask].tolist() == pytest.approx([1 / sum(whole)] * sum(whole))


def test_rewards_are_weighed_before_or_after_normalising(tmp_path):
    """Wrong implementations: weights that only the log sees; two rewards of which one is used; the verifier's
    value among them.
    """

    def first(completions, **columns):
        return [float(i % 4) for i in range(len(completions))]

    def second(completions, **columns):
        return [100.0 * (i % 2) for i in range(len(completions))]

    texts = [str(i) for i in range(12)]
    scored = Scorer(None, [first, second], [1.0, 0.5])(texts, texts, [[1]] * 12, [{}] * 12)
    assert scored.reward[:4] == [0, 51, 2, 53] and {k: w for k, (w, _) in scored.each.items()} == {
        "first": 1.0,
        "second": 0.5,
    }
    assert scored == score([first, second], texts, texts, [[1]] * 12, [{}] * 12, weights=[1.0, 0.5])
    found = {}
    for how in ("sum_then_normalize", "normalize_then_sum"):
        source = on_policy(decoder(), ALGORITHMS["grpo"], multi_objective_aggregation=how)
        rescore(source, lambda *given: scored)
        batch = source.collect(0, 0).batches[0]
        found[how] = batch.advantage[batch.cu_seqlens[:-1].long()][:4]
    one, two = torch.arange(4.0), torch.tensor([0.0, 100, 0, 100])
    torch.testing.assert_close(found["sum_then_normalize"], _z(one + two / 2), rtol=1e-4, atol=1e-4)
    x = (_z(one) + _z(two) / 2).repeat(3)
    torch.testing.assert_close(found["normalize_then_sum"], (x / (x.std() + 1e-4))[:4], rtol=1e-4, atol=1e-4)
    config = Grpo(model="m", task="cards", reward_weights=(1.0, 2.0))
    with pytest.raises(UserError, match=r"--reward-weights: expected one per --reward \(1\), got 2"):
        load_prompts(config, None, None, 64, 31)
    with pytest.raises(UserError, match=r"--reward-weights: expected finite numbers of at most .*, got nan"):
        load_prompts(replace(config, reward_weights=(math.nan,)), None, None, 64, 31)


def _z(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.std() + 1e-4)


def test_a_process_without_prompts_has_no_advantages():
    """Wrong implementation: the rewards of the others read by this process's own functions, of which it
    called none.
    """

    class Other(World):
        def _reduce(self, values, op):
            return list(values)

        def gather(self, rows):
            return rows or [(0, 5, 1.0, 2.0, 3.0)] * GROUP

    source = on_policy(decoder(), ALGORITHMS["reinforce++"], world=Other(0, 2), prompts=1)
    rescore(source, lambda *given: Scored([]))
    assert len(source.collect(0, 0).batches[0]) == 0


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"refill": -1}, "grpo", "--refill: expected a number of rounds of 0 or more, got -1"),
        (
            {"refill": 1, "group": 1},
            "reinforce++",
            "--refill: expected 0 with --group 1, whose groups never have two rewards, got 1",
        ),
        (
            {"overlong_buffer": 300},
            "grpo",
            r"--overlong-buffer: expected 0 to --max-new-tokens \(256\), got 300",
        ),
        ({"group": 1}, "reinforce++_baseline", "--group: expected at least 2"),
    ],
)
def test_settings_of_the_rollouts_are_refused(changes, name, message):
    with pytest.raises(UserError, match=message):
        check_rollouts(Grpo(**{"model": "m"} | changes), least=ALGORITHMS[name].advantage.least)
    check_rollouts(Grpo(model="m", group=1), least=ALGORITHMS["reinforce++"].advantage.least)


def test_a_run_with_everything(tmp_path, monkeypatch):
    """Every option of the family in one run, twice.  Wrong implementation:
    one that the run does not hand on.
    """
    monkeypatch.setattr(fastrl.trainer.report, "build", lambda folder: None)
    options = {
        "steps": 2,
        "algorithm": "dapo",
        "correction": "sequence_truncate",
        "minibatches": 2,
        "refill": 1,
        "overlong_buffer": 2,
        "off_policy_mask_threshold": 0.5,
        "semantics": "verl",
        "delta": 5.0,
    }
    for name in ("a", "b"):
        fastrl.trainer.train(grpo(tmp_path, name, **options))
    rows = lines(tmp_path / "a")
    assert rows == lines(tmp_path / "b")
    last = rows[-2]
    assert (
        last["sampling/sampling_logp_difference/max"] < 1e-5
        and last["sampler/kl"] < 1e-10
        and last["sampler/ess"] > 1 - 1e-9
    )
    assert (
        last["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
        and last["refill/groups"] >= 4
    )
    assert last["rewards/overlong/mean"] <= 0 and last["sampler/staleness_max"] == 0
