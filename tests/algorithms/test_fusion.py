"""Fusions of preferences and reinforcement learning: GRPO beside offline pairs, and pairs among a group's
members.

tests/helpers/fusions.py restates the equations; on-policy pairs and lists are in test_group_preference.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from configs import configured, for_some_row
from fusions import (
    COUNT,
    SCORES,
    WRONG,
    alone,
    fused,
    groups,
    grpo,
    members,
    offline,
    offline_sides,
    sample,
    with_members,
)
from fusions import on_policy as drawn_by
from hybrids import ANSWERS, half_cosine, learner
from preferences import EQUATIONS
from runs import GROUP, PROMPTS, SEED, decoder, drift, gradient, learner_of, relative
from runs import learner as plain_learner

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.hybrid import HYBRIDS, MEMBER, OWN, OfflinePairs
from fastrl.algorithms.preference import PREFERENCES
from fastrl.algorithms.schedule import Schedule
from fastrl.config import AlgorithmChoice, Hybrid, Sampling
from fastrl.errors import UserError
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.hybrid.objective import Both, HybridObjective, gradients_by_term
from fastrl.methods.hybrid.options import check_mixture
from fastrl.methods.hybrid.pair_options import choose_hybrid
from fastrl.methods.hybrid.pair_options import offline as offline_run
from fastrl.train.objective import PolicyObjective
from fastrl.train.source import order

F64 = torch.float64
ROW = FUSIONS["grpo_dpo"]
CONSTANT = Schedule(1.0, 1.0)


def trainer(model, row, micro_tokens=10**6):
    policy = HybridObjective(PolicyObjective(model, row), row)
    objective = Both(policy, UnitObjective(model, row.pairs.preference))
    return learner_of(objective, model, micro_tokens, gradients=gradients_by_term)


def only_pairs(row):
    return replace(row, rule=replace(row.rule, params={"rl_coef": 0.0}))


# --- GRPO beside offline pairs ------------------------------------------------------------------------
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", ["dpo", "ipo", "rpo", "simpo", "ld_dpo"])
def test_both_terms_are_their_equations(name, step):
    """Wrong implementations: one denominator for pairs and completions; a mean over all sequences; the
    policy's temperature or clip on the pairs; a weight of another step; the pairs of the rollouts' prompts; a
    coefficient applied twice.
    """
    model = decoder(dtype=F64)
    row = replace(ROW, pairs=OfflinePairs(PREFERENCES[name], Schedule(peak=0.7, end=0.1)))
    source = fused(model, row)
    now, batch = groups(model, source.rollouts, SCORES, step), source.collect(step, 0).batches[0]
    drift(model, 0.03)
    weight = half_cosine(step, 0.7, 0.1, 0, 10)
    pairs = EQUATIONS[name](*offline_sides(model, step)).mean()
    loss = -grpo(now()) + weight * pairs
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(trainer(model, row, 20), batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6) and metrics["pairs/loss"] == pytest.approx(
        pairs.item(), rel=1e-6
    )
    assert relative(got, want) < 1e-6


def test_cutting_and_order_change_nothing():
    """Wrong implementations: counts of a micro-batch in a denominator; a pair that a micro-batch cuts."""
    model = decoder(dtype=F64)
    batch = fused(model, ROW).collect(0, 0).batches[0]
    drift(model, 0.03)
    a, g = gradient(trainer(model, ROW), batch)
    turned = replace(
        batch,
        policy=batch.policy.select(range(len(batch.policy))[::-1]),
        pairs=batch.pairs.select([2, 3, 0, 1]),
    )
    b, h = gradient(trainer(model, ROW, 16), turned)
    assert relative(h, g) < 1e-12 and b == pytest.approx(a, rel=1e-6, abs=1e-9)


def test_without_pairs_it_is_grpo_exactly():
    """At a coefficient of 0.  Wrong implementations: pairs forwarded all the same, whose zeros change a sum's
    order; completions that are weighed by a share of something.
    """
    model, row = decoder(), replace(ROW, pairs=OfflinePairs(PREFERENCES["dpo"], Schedule(0.0, 0.0)))
    ours = fused(model, row).collect(0, 0).batches[0]
    theirs = drawn_by(model, ALGORITHMS["grpo"], SCORES).collect(0, 0).batches[0]
    drift(model, 0.03)
    got, want = (
        gradient(trainer(model, row, 20), ours),
        gradient(plain_learner(model, ALGORITHMS["grpo"], 20, temperature=1.0), theirs),
    )
    assert torch.equal(got[1], want[1]) and got[0] == want[0]
    assert ours.pairs is None and not any(name.startswith("pairs/") for name in got[0])


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_without_completions_it_is_dpo_exactly(name):
    """Wrong implementations: a scaled loss for a scaled weight at a coefficient of 1; gradients added to
    zeros in another order.
    """
    model, row = decoder(), only_pairs(replace(ROW, pairs=OfflinePairs(PREFERENCES[name], CONSTANT)))
    batch = fused(model, row).collect(2, 0).batches[0]
    assert len(batch.policy) == 0
    pairs = offline(row).collect(2, 0).batches[0]
    drift(model, 0.03)
    metrics, got = gradient(trainer(model, row, 20), batch)
    theirs, want = gradient(
        learner_of(UnitObjective(model, row.pairs.preference), model, micro_tokens=20), pairs
    )
    assert torch.equal(got, want) and metrics["loss"] == metrics["pairs/loss"] == theirs["loss"]
    assert (
        metrics["num_tokens"]
        == theirs["num_tokens"]
        == sum(len(x[i]) for x in (ANSWERS, WRONG) for i in order(3, SEED, 2 * COUNT, COUNT))
    )
    assert all(
        metrics[f"pairs/{key}"] == x
        for key, x in theirs.items()
        if key not in ("loss", "num_tokens", "entropy")
    )


def test_gradient_norms_of_both_terms():
    """Measured beside the step, which keeps its bits.  Wrong implementations: the norm of the sum; a term
    without its coefficient; a gradient left from the measurement.
    """
    model = decoder()
    row = replace(ROW, pairs=OfflinePairs(PREFERENCES["dpo"], Schedule(0.5, 0.5)))
    batches = [fused(model, row, norms_every=every).collect(2, 0).batches[0] for every in (2, 3, 0)]
    assert [b.measured for b in batches] == [True, False, False]
    drift(model, 0.03)
    (told, got), (silent, want), _ = (gradient(trainer(model, row, 20), b) for b in batches)
    assert torch.equal(got, want) and told.keys() - silent.keys() == {"grad_norm/rl", "grad_norm/pairs"}
    rl = gradient(trainer(model, row, 20), replace(batches[1], pairs=None))[1]
    pairs = gradient(trainer(model, row, 20), replace(batches[1], policy=batches[1].policy.select([])))[1]
    assert told["grad_norm/rl"] == pytest.approx(float(rl.norm()), rel=1e-5)
    assert told["grad_norm/pairs"] == pytest.approx(float(pairs.norm()), rel=1e-4)
    (told, _) = gradient(trainer(model, row), replace(batches[0], pairs=None))
    assert told["grad_norm/pairs"] == 0


def test_every_optimizer_step_has_pairs_of_its_own():
    """Wrong implementations: the same pairs for all minibatches and epochs;
    pairs numbered by training steps.
    """
    source = fused(decoder(), ROW, minibatches=3, epochs=2)
    for step in (0, 1):
        batches = source.collect(step, 0).batches
        seen = [[int(t) for t in b.pairs.tokens[b.pairs.cu_seqlens[:-1].long()[::2]]] for b in batches]
        assert seen == [
            [PROMPTS[i][0] for i in order(3, SEED, (6 * step + k) * COUNT, COUNT)] for k in range(6)
        ]
        assert all(float(b.pairs.weight[0]) == pytest.approx(b.coef / COUNT) for b in batches)


def test_pairs_train_where_no_reward_differs():
    """Wrong implementations: a step skipped because the rollouts have no signal; one taken, on AdamW's
    momentum, without any.
    """
    model, still = decoder(), replace(ROW, pairs=OfflinePairs(PREFERENCES["dpo"], Schedule(0.0, 0.0)))
    before = [p.clone() for p in model.parameters()]
    batch = fused(model, still, [1.0] * 12).collect(0, 0).batches[0]
    assert trainer(model, still).update(batch, 0)["num_tokens"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    metrics = trainer(model, ROW).update(fused(model, ROW, [1.0] * 12).collect(0, 0).batches[0], 0)
    assert metrics["num_tokens"] > 0 and not all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


def test_the_weight_rises_and_falls_as_mu_does():
    """Wrong implementations: a decay counted from step 0; a peak before the end of warm-up."""
    got = [Schedule(0.8, 0.1, 4, 10)(step, 99) for step in range(20)]
    assert got == pytest.approx([half_cosine(step, 0.8, 0.1, 4, 10) for step in range(20)])
    assert [Schedule()(step, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


# --- pairs among a group's members --------------------------------------------------------------------
@pytest.mark.parametrize("name", ["grpo_pairs", "luffy_pairs"])
@pytest.mark.parametrize(
    "known", [(0, 2), (0, 1, 2)], ids=["one prompt without a pair", "one without the rejected side"]
)
@pytest.mark.parametrize("scores", [SCORES, [1.0] * 12], ids=["some", "all equal"])
def test_members_are_their_equations(name, known, scores):
    """Wrong implementations: members outside the group's mean or deviation; the rejected one taken for
    chosen; a side that is missing counted as a sample of reward 0; a ratio for the likelihood; a group of
    equal completions left out although its members differ.
    """
    model, row = decoder(dtype=F64), FUSIONS[name]
    source = members(model, row, scores, known, demo_reward=1.0, rejected_reward=-0.5)
    now, batch = groups(model, source, scores), source.collect(0, 0).batches[0]
    drift(model, 0.03)
    shown = []
    for i in order(3, SEED, 0, 3):
        sides = [(ANSWERS, 1.0), (WRONG, -0.5)][: 1 if i == 1 else 2] if i in known else []
        shown.append([(alone(model, sample(i, completions[i])), reward) for completions, reward in sides])
    loss = -with_members(now(), shown, name)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(learner(model, row, 20), batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-8) and relative(got, want) < 1e-6


@pytest.mark.parametrize("name", ["grpo_pairs", "luffy_pairs"])
def test_without_pairs_members_leave_grpo_as_it_is(name):
    """Wrong implementation: the empty places of a pair in the group's mean or in a denominator."""
    model, row = decoder(), FUSIONS[name]
    base = replace(ALGORITHMS["grpo" if name == "grpo_pairs" else "dr_grpo"], surrogate=row.policy.surrogate)
    batches = [
        s.collect(0, 0).batches[0] for s in (members(model, row, known=()), drawn_by(model, base, SCORES))
    ]
    drift(model, 0.03)
    got, want = (
        gradient(learner(model, row), batches[0]),
        gradient(plain_learner(model, base, temperature=1.0), batches[1]),
    )
    assert torch.equal(got[1], want[1]) and got[0] == want[0] | {"off_policy_share": 0.0}


def test_members_stay_with_their_prompt():
    """Wrong implementations: both chosen sides first; groups cut by their completions alone."""
    batches = (
        members(decoder(), FUSIONS["grpo_pairs"], range(12), (0, 1, 2), minibatches=3).collect(0, 0).batches
    )
    for batch in batches:
        first = batch.cu_seqlens[:-1].long()
        prompt = next(i for i, p in enumerate(PROMPTS) if p[0] == int(batch.tokens[0]))
        assert batch.kind[first].tolist() == [OWN] * GROUP + [MEMBER] * (1 if prompt == 1 else 2)
        assert {int(t) for t in batch.tokens[first]} == {PROMPTS[prompt][0]}
        spans = batch.cu_seqlens.tolist()
        assert batch.tokens[spans[GROUP] : spans[GROUP + 1]].tolist() == PROMPTS[prompt] + ANSWERS[prompt]
    alone_ = replace(FUSIONS["grpo_pairs"], sides=1)
    batch = members(decoder(), alone_, range(12), (0, 1, 2)).collect(0, 0).batches[0]
    assert len(batch) == 3 * (GROUP + 1)


# --- options ------------------------------------------------------------------------------------------
def chosen(**changes):
    return choose_hybrid(configured(Hybrid, **{"model": "m"} | changes))


def test_options_change_a_row():
    """Wrong implementations: an option of 0 taken for none; an option that reaches another part of the
    row.
    """
    row = chosen(
        algorithm="grpo_dpo",
        preference="ipo",
        beta=0.5,
        pair_coef=0.0,
        pair_warmup=3,
        rl="dapo",
        kl_coef=0.1,
        rl_coef=0.5,
    )
    assert (row.pairs.preference.params["beta"], row.pairs.preference.rule, row.pairs.coef) == (
        0.5,
        PREFERENCES["ipo"].rule,
        Schedule(0.0, 0.0, 3, 0),
    )
    assert (row.policy.surrogate, row.policy.kl_coef, row.rule.params) == (
        ALGORITHMS["dapo"].surrogate,
        0.1,
        {"rl_coef": 0.5},
    )
    assert (
        chosen(algorithm="grpo_dpo", nll_coef=0.25).pairs.preference.nll == 0.25
        and chosen(algorithm="grpo_dpo") == ROW
    )
    assert chosen(algorithm="luffy_pairs", gamma=0.5).member.surrogate.params == {"gamma": 0.5}
    assert [chosen(algorithm="grpo_pairs", members=x).sides for x in (None, "both", "chosen")] == [2, 2, 1]
    assert chosen(algorithm="hpt") == HYBRIDS["hpt"]
    asked = configured(
        Hybrid,
        model="m",
        algorithm="grpo_dpo",
        steps=5,
        minibatches=2,
        epochs=3,
        prompts=7,
        dataset="d",
        columns=("q=prompt",),
        seed=4,
    )
    run = offline_run(asked)
    assert (run.steps, run.prompts, run.dataset, run.columns, run.seed, run.algorithm.name) == (
        30,
        7,
        "d",
        ("q=prompt",),
        4,
        "dpo",
    )
    options = AlgorithmChoice("grpo_dpo", {"pair_dataset": "p", "pairs": 3})
    run = offline_run(replace(asked, algorithm=options))
    assert (run.prompts, run.dataset, run.columns) == (3, "p", ())


def test_pairs_beside_rollouts_leave_these_free():
    """Wrong implementations: refill, carried tails and conversations refused for demonstrations that are not
    there; what is asked of these taken, and ignored.
    """
    check_mixture(
        Hybrid(model="m", refill=1, tail="carry", multi_objective_aggregation="normalize_then_sum"),
        ROW,
        turns=True,
    )
    source = fused(decoder(), ROW, refill=2)
    assert len(source.collect(0, 0).batches[0].policy) > 0
    with pytest.raises(UserError, match="--refill: expected 0"):
        check_mixture(Hybrid(model="m", refill=1), FUSIONS["grpo_pairs"])
    with pytest.raises(
        UserError,
        match=r"--sampling\.temperature: expected 1, at which demonstrations and pairs are scored, got 0.5",
    ):
        check_mixture(Hybrid(model="m", sampling=Sampling(temperature=0.5)), ROW)
    for changes in ({"demo_reward": 2.0}, {"solved": 0.5}):
        with pytest.raises(UserError, match=r"--(demo-reward|solved): grpo_dpo has no such option"):
            configured(Hybrid, model="m", algorithm="grpo_dpo", **changes)
        check_mixture(for_some_row(Hybrid, model="m", **changes), FUSIONS["grpo_pairs"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "dpo"}, "--algorithm: expected one of hpt, .*, grpo_dpo, .*; got 'dpo'"),
        ({"algorithm": "grpo_dp"}, "got 'grpo_dp'; did you mean 'grpo_dpo'"),
        (
            {"pair_coef": 0.5},
            "--pair-coef: hpt has no such option; take .* that has it: grpo_dpo",
        ),
        ({"algorithm": "grpo_dpo", "pair_coef": -1.0}, "--pair-coef: expected a number of 0 or more, got -1"),
        (
            {"algorithm": "grpo_dpo", "pair_coef": math.nan},
            "--pair-coef: expected a number of 0 or more, got nan",
        ),
        ({"algorithm": "grpo_dpo", "pairs": 0}, "--pairs: expected at least 1, got 0"),
        ({"algorithm": "grpo_dpo", "norms_every": -1}, "--norms-every: expected steps, 0 or more, got -1"),
        (
            {"algorithm": "grpo_dpo", "preference": "kto"},
            "--preference: expected a loss of pairs .dpo, .*, got kto",
        ),
        (
            {"algorithm": "grpo_dpo", "preference": "dppo"},
            "--preference: expected one of dpo, cdpo, .*; got 'dppo'; did you mean",
        ),
        (
            {"algorithm": "grpo_dpo", "preference": "simpo", "reference": "live"},
            "--reference: simpo has no reference model",
        ),
        (
            {"algorithm": "grpo_dpo", "gap": 0.5},
            "--gap: grpo_dpo has no such option; take an --algorithm that has it: online_dpo",
        ),
        ({"algorithm": "grpo_dpo", "mu": 0.5}, "--mu: grpo_dpo has no such option"),
        ({"algorithm": "grpo_pairs", "gamma": 0.5}, "--gamma: grpo_pairs has no such .*: luffy, luffy_pairs"),
        (
            {"algorithm": "luffy_pairs", "group_statistics": "own"},
            "--group-statistics: luffy_pairs has no such option; .*: luffy, srft",
        ),
        (
            {"algorithm": "grpo_pairs", "members": "chosen", "rejected_reward": 0.0},
            "--rejected-reward: expected --members both",
        ),
        (
            {"algorithm": "grpo_pairs", "rejected_reward": math.inf},
            "--rejected-reward: expected a finite number, got inf",
        ),
        (
            {"algorithm": "luffy", "members": "both"},
            "--members: luffy has no such option; take .*: grpo_pairs, luffy_pairs",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        chosen(**changes)
