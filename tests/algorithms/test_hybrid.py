"""Hybrids: every row against its equations through model, packing and denominators; what they become at their
ends; gates and options.

tests/helpers/hybrids.py restates the equations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from configs import configured
from hybrids import (
    ANSWERS,
    OBJECTIVES,
    SCORES,
    demonstration,
    groups,
    half_cosine,
    learner,
    luffy,
    mixture,
    with_rule,
)
from runs import BUDGET, GROUP, SEED, decoder, drift, gradient, relative
from runs import learner as plain_learner
from torch import Tensor

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.hybrid import (
    DENOMINATORS,
    HYBRIDS,
    MEMBER,
    OWN,
    SUPERVISED,
    Estimator,
    certain,
    phi,
    uncertain,
)
from fastrl.algorithms.schedule import Schedule
from fastrl.batch.types import Tokens
from fastrl.config import Hybrid, Sampling
from fastrl.errors import UserError
from fastrl.methods.grpo.rollouts import RolloutSource
from fastrl.methods.grpo.shaping import policy_shaping
from fastrl.methods.hybrid.members import weigh_apart
from fastrl.methods.hybrid.objective import only
from fastrl.methods.hybrid.options import check_mixture, choose_mixture
from fastrl.methods.sft.batches import Demonstrations
from fastrl.ops import SURROGATES
from fastrl.parallel.world import World
from fastrl.train.objective import batch_logp
from fastrl.train.source import order

F64 = torch.float64
ALL, NONE = (0, 1, 2), ()


# --- the equations ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "known"), [*((name, (0, 1)) for name in HYBRIDS), ("hpt", ALL), ("luffy", ALL), ("srft", NONE)]
)
def test_loss_and_gradient_are_those_of_the_equations(name, known):
    """Wrong implementations: one denominator for completions and supervised tokens; gated completions left in
    a denominator; the demonstration outside its group's mean; a gradient through phi or an entropy weight; a
    missing demonstration counted as a sample.
    """
    model = decoder(dtype=F64)
    source = mixture(model, HYBRIDS[name], known=known)
    now, batch = groups(model, source, SCORES, known), source.collect(0, 0).batches[0]
    drift(model, 0.03)
    loss = -OBJECTIVES[name](now())
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    metrics, got = gradient(learner(model, HYBRIDS[name], 20), batch)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-8)
    assert relative(got, want) < 1e-6


@pytest.mark.parametrize("scale", ["none", "group"])
def test_statistics_of_the_completions_alone(scale):
    """LUFFY's grpo_split, through the loss; with a deviation, by the advantages of every group; and of groups
    without spread.

    Wrong implementations: the demonstration in the mean, or in the deviation; a demonstration of a flat group
    divided by epsilon; its place in a group's deviation where it is not there.
    """
    row = choose_mixture(
        configured(Hybrid, model="m", algorithm="luffy", group_statistics="own", scale_rewards=scale)
    )
    model = decoder(dtype=F64)
    source = mixture(model, row, known=(0, 1))
    now, batch = groups(model, source, SCORES, (0, 1)), source.collect(0, 0).batches[0]
    # samples that move nothing leave the batch
    want = torch.tensor([a for g in now() for a in g.measured_by_own(scale == "group") if a])
    torch.testing.assert_close(batch.advantage[batch.cu_seqlens[:-1].long()], want, rtol=1e-6, atol=1e-7)
    flat = row.policy.advantage(torch.tensor([0.5, 0.5, 0.5, 1, 0, 0, 0, nan, nan, nan, nan, 1]), 4)
    assert flat.tolist() == [0, 0, 0, 0.5, *[0] * 8]
    if scale == "none":
        drift(model, 0.03)
        loss = -luffy(now(), split=True)
        slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        metrics, got = gradient(learner(model, row, 20), batch)
        assert (
            metrics["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-8) and relative(got, slopes) < 1e-6
        )


@pytest.mark.parametrize("name", HYBRIDS)
def test_cutting_and_order_change_nothing(name):
    """Wrong implementations: counts of a micro-batch in a denominator; kinds, or what a prompt counts, taken
    by place.
    """
    model = decoder(dtype=F64)
    batch = mixture(model, HYBRIDS[name]).collect(0, 0).batches[0]
    drift(model, 0.03)
    a, g = gradient(learner(model, HYBRIDS[name]), batch)
    b, h = gradient(learner(model, HYBRIDS[name], 14), batch.select(list(range(len(batch)))[::-1]))
    assert relative(h, g) < 1e-12 and a["loss"] == pytest.approx(b["loss"], rel=1e-10)
    assert {k: b[k] for k in a} == pytest.approx(a, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["hpt", "srft"])
def test_denominators_are_of_all_processes(name):
    """Wrong implementations: counts of one process's share; supervised tokens and completions in one sum."""
    row = HYBRIDS[name]
    raw = lambda shaping: replace(shaping, weigh=lambda part: part, prune=lambda part: part)  # noqa: E731
    source = mixture(decoder(dtype=F64), row, reshape=raw)
    whole = source.collect(0, 0).batches[0]
    halves, seen = [whole.select(range(5)), whole.select(range(5, len(whole)))], []

    class Told(World):
        def sum(self, *values):
            seen.append(values)
            return list(values)

    class Summed(World):
        def sum(self, *values):
            return [sum(x) for x in zip(*seen, strict=True)]

    want = weigh_apart(whole, row, World(), group=GROUP, max_length=BUDGET).weight
    for half in halves:
        weigh_apart(half, row, Told(), group=GROUP, max_length=BUDGET)
    got = torch.cat(
        [weigh_apart(half, row, Summed(), group=GROUP, max_length=BUDGET).weight for half in halves]
    )
    assert torch.equal(got, want) and len(want.unique()) > 1


# --- the four parts -----------------------------------------------------------------------------------
def tokens(n: int = 40, spread: float = 0.3) -> Tokens:
    draw = torch.Generator().manual_seed(1)
    logp = -3 * torch.rand(n, generator=draw, dtype=F64)
    x, y, h = (torch.randn(n, generator=draw, dtype=F64) for _ in range(3))
    ends = torch.tensor([0, 7, 7, 25, n], dtype=torch.int32)
    return Tokens(
        old_logp=logp - spread * x,
        advantage=y,
        weight=torch.full((n,), 0.1, dtype=F64),
        cu_seqlens=ends,
        live=n,
    ).with_(logp, h.abs())


def slope(loss, t: Tokens) -> Tensor:
    """-d loss / d logp, without the aggregate: W of the four parts."""
    leaf = t.logp.clone().requires_grad_()
    return -torch.autograd.grad(loss(replace(t, logp=leaf)), leaf)[0] / t.weight


def mean_of(x: Tensor, t: Tokens) -> Tensor:
    parts = [x[a:b] for a, b in zip(t.cu_seqlens[:-1].tolist(), t.cu_seqlens[1:].tolist(), strict=True)]
    return torch.cat([p.mean().expand(len(p)) for p in parts if len(p)])


def inside(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return (~(((A > 0) & (r > 1 + high)) | ((A < 0) & (r < 1 - low)))).to(r.dtype)


def test_every_method_is_mask_denominator_advantage_and_likelihood():
    """W = 1_stable A exp(logp - den) of the unified estimator.  Wrong implementations: pi_old as SFT's
    denominator; the recorded log-prob as LUFFY's; a mask by the ratio alone; GSPO's ratio of one token.
    """
    t = tokens()
    everywhere, A, p, r = (
        torch.ones(t.live, dtype=torch.bool),
        t.advantage,
        t.logp.exp(),
        (t.logp - t.old_logp).exp(),
    )
    one, zeros = torch.ones_like(A), torch.zeros_like(A)
    s = mean_of(t.logp - t.old_logp, t).exp()

    def unified(stable, denominator, advantage):
        return stable * advantage * (t.logp - denominator).exp()

    own = {
        "sft": unified(one, t.logp, one),
        "rloo": unified(one, t.logp, A),
        "grpo": unified(inside(r, A, 0.2, 0.2), t.old_logp, A),
        "cispo": unified(r.clamp(0, 5) / r, t.old_logp, A),
        "gspo": unified(inside(s, A, 3e-4, 4e-4), t.logp - s.log(), A),
    }
    for name, weight in own.items():
        torch.testing.assert_close(slope(ALGORITHMS[name].loss, t), weight, rtol=1e-10, atol=1e-12)
    shown = {
        "luffy": (HYBRIDS["luffy"].member, unified(0.1 / (p + 0.1).square(), zeros, A)),
        "srft": (HYBRIDS["srft"].member, unified(one, zeros, A)),
        "sft": (HYBRIDS["hpt"].supervised, unified(one, t.logp, A)),
        "sft by its ratio": (Estimator(SURROGATES["ratio"], "policy"), unified(one, t.logp, A)),
        "chord_phi": (HYBRIDS["chord_phi"].supervised, unified(p * (1 - p), t.logp, A)),
        "srft, supervised": (
            HYBRIDS["srft"].supervised,
            unified(0.5 * (-mean_of(t.entropy, t)).exp(), t.logp, A),
        ),
    }
    for estimator, weight in shown.values():
        torch.testing.assert_close(
            slope(lambda x, e=estimator: e.loss(x, everywhere), t), weight, rtol=1e-10, atol=1e-12
        )
    assert set(DENOMINATORS) == {"policy", "old", "one"}


def test_hand_worked_weights():
    """LUFFY and phi at p = 1/e; SRFT at H = 0.5."""
    t = Tokens(
        old_logp=torch.zeros(1, dtype=F64),
        advantage=torch.ones(1, dtype=F64),
        weight=torch.ones(1, dtype=F64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        live=1,
    ).with_(torch.tensor([-1.0], dtype=F64), torch.tensor([0.5], dtype=F64))
    live, member = torch.ones(1, dtype=torch.bool), HYBRIDS["luffy"].member
    assert float(-member.loss(t, live)) == pytest.approx(0.78627, abs=1e-5)
    assert float(slope(lambda x: member.loss(x, live), t)) == pytest.approx(0.16805, abs=1e-5)
    weights = [float(f(t, SURROGATES["pg"])) for f in (phi, certain, uncertain)]
    assert weights == pytest.approx([0.232544, 0.303265, 0.164872], abs=1e-6)
    assert uncertain(replace(t, advantage=-t.advantage), SURROGATES["pg"]) == 1


# --- the special cases --------------------------------------------------------------------------------
def supervised_gradient(model):
    """Of the `sft` row, on the demonstrations of all prompts."""
    shown = order(3, SEED, 0, 3)
    source = Demonstrations(
        lambda some: [demonstration(shown[i]) for i in sorted(some)],
        3,
        count=3,
        algorithm=ALGORITHMS["sft"],
        seed=0,
        device=torch.device("cpu"),
        world=World(),
    )
    return gradient(plain_learner(model, ALGORITHMS["sft"]), source.collect(0, 0).batches[0])


@pytest.mark.parametrize(
    "row", [with_rule("hpt", gate=1.0), with_rule("mixed", rl_coef=0.0), with_rule("chord", mu=1.0)]
)
def test_with_demonstrations_alone_it_is_sft_exactly(row):
    """Wrong implementations: completions that still count; a denominator that counts them; an advantage other
    than 1.
    """
    model = decoder()
    metrics, got = gradient(learner(model, row), mixture(model, row).collect(0, 0).batches[0])
    theirs, want = supervised_gradient(model)
    assert torch.equal(got, want)
    assert [metrics["loss"], metrics["sft_loss"]] == pytest.approx([theirs["loss"]] * 2, rel=1e-6)
    assert (
        metrics["num_tokens"] == theirs["num_tokens"] == sum(map(len, ANSWERS))
        and metrics["off_policy_share"] == 1
    )
    assert not {"ratio_mean", "approx_kl", "tokens"} & metrics.keys(), (
        "there are no tokens of its own to measure"
    )


@pytest.mark.parametrize("name", ["hpt", "hpt_soft", "luffy", "mixed", "chord_phi"])
def test_without_demonstrations_it_is_reinforcement_learning_exactly(name):
    """Wrong implementation: the place of a demonstration that is not there in the group's mean or in a
    denominator.
    """
    model, row = decoder(), with_rule("chord_phi", mu=0.0) if name == "chord_phi" else HYBRIDS[name]
    base = replace(
        ALGORITHMS["grpo" if row.policy.advantage.params["scale"] == "std" else "dr_grpo"],
        surrogate=row.policy.surrogate,
    )
    source = mixture(model, row, known=NONE)
    plain = policy_shaping(source.config, base, source.world)
    other = RolloutSource(source.config, source.groups, source.extra, plain, source.world)
    batches = [s.collect(0, 0).batches[0] for s in (source, other)]
    drift(model, 0.03)
    got, want = (
        gradient(learner(model, row), batches[0]),
        gradient(plain_learner(model, base, temperature=1.0), batches[1]),
    )
    assert torch.equal(got[1], want[1]) and got[0] == want[0] | {"off_policy_share": 0.0}


# --- gates --------------------------------------------------------------------------------------------
T, F = True, False
nan = math.nan


@pytest.mark.parametrize(
    ("name", "solved", "there", "want"),
    [
        ("hpt", [0.0, 0.125, 1.0, nan], [T, T, T, T], [(0, 0, 1), (1, 0, 0), (1, 0, 0), (1, 0, 0)]),
        ("hpt", [0.0, 1.0], [F, F], [(1, 0, 0), (1, 0, 0)]),
        (
            "hpt_soft",
            [0.0, 0.2, 0.25, 0.5],
            [T] * 4,
            [(0, 0, 1), (0, 0, 1), (0.125, 0, 0.5), (0.5, 0, 0.125)],
        ),
        ("hpt_soft", [0.625, 1.0], [T] * 2, [(1, 0, 0), (1, 0, 0)]),
        ("hpt_soft", [0.0, nan], [F, T], [(1, 0, 0), (1, 0, 0)]),
        ("luffy", [0.0, 1.0], [T, F], [(1, 1, 0), (1, 0, 0)]),
        ("srft", [0.0, 1.0], [T, F], [(1, 1, 1), (1, 0, 0)]),
        ("chord", [0.0, 1.0], [T, F], [(0.1, 0, 0.9), (0.1, 0, 0)]),
        ("mixed", [0.0, 1.0], [T, F], [(1, 0, 1), (1, 0, 0)]),
    ],
)
def test_gates_at_their_edges(name, solved, there, want):
    """Wrong implementations: < for <= at the gate; no scores taken for none solved; a prompt without a
    demonstration that is gated, and so learns nothing.
    """
    got = HYBRIDS[name].rule(torch.tensor(solved), torch.tensor(there), 0, 10)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))


def test_the_gate_is_a_share_of_solved_completions():
    """Wrong implementations: the mean reward for the share that is solved; a gate that opens at its
    threshold.
    """
    model = decoder()
    scores = [1.0, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 0.0, 0.0]
    for gate, solved, taught in ((0.0, 1.0, 1), (0.25, 1.0, 2), (0.5, 1.0, 3), (0.0, 0.9, 0), (0.0, 2.0, 3)):
        told = mixture(model, with_rule("hpt", gate=gate), scores, solved=solved).collect(0, 0).metrics
        assert told["hybrid/sft_prompts"] == pytest.approx(taught / 3) == 1 - told["hybrid/rl_prompts"]
    assert told["hybrid/solved"] == 0 and told["hybrid/demonstrated"] == 1


def test_all_solved_and_nothing_to_learn_is_no_step():
    """Every reward equal and every gate open: no token is left, and the learner must not step."""
    model = decoder()
    batch = mixture(model, HYBRIDS["hpt"], [1.0] * 12).collect(0, 0).batches[0]
    assert len(batch) == 0
    before = [p.clone() for p in model.parameters()]
    metrics = learner(model, HYBRIDS["hpt"]).update(batch, 0)
    assert metrics["num_tokens"] == 0 and all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


def test_mu_rises_and_falls():
    """Wrong implementations: a decay counted from step 0; a warm-up that ends above the peak;
    a linear decay.
    """
    row = with_rule("chord", mu=0.8, mu_end=0.1, mu_warmup=4, mu_decay=10)
    got = [
        float(row.rule(torch.zeros(1), torch.ones(1, dtype=torch.bool), step, 99)[0, SUPERVISED])
        for step in range(20)
    ]
    assert got == pytest.approx([half_cosine(step, 0.8, 0.1, 4, 10) for step in range(20)], abs=1e-6)
    assert got[0] == 0 and got[4] == pytest.approx(0.8) and got[14:] == pytest.approx([0.1] * 6)


def test_minibatches_hold_whole_groups_with_their_demonstrations():
    """Wrong implementation: groups cut by their completions alone, so that a demonstration lands in another
    prompt's minibatch.
    """
    model = decoder()
    batches = mixture(model, HYBRIDS["srft"], minibatches=3, epochs=2).collect(0, 0).batches
    assert len(batches) == 6
    for batch in batches:
        first = batch.cu_seqlens[:-1].long()
        assert batch.kind[first].tolist() == [OWN] * GROUP + [MEMBER, SUPERVISED]
        assert len({int(t) for t in batch.tokens[first]}) == 1, "one prompt"


def test_metrics_tell_own_tokens_from_others():
    """Wrong implementations: the demonstration's ratio in the policy's; its tokens left out of num_tokens; a
    mean of means.
    """
    model, row = decoder(), HYBRIDS["srft"]
    batch = mixture(model, row).collect(0, 0).batches[0]
    trained = learner(model, row, 20)
    metrics = gradient(trained, batch)[0]
    logp = batch_logp(model, batch, micro_tokens=20, temperature=1.0)
    taught = (batch.kind == SUPERVISED) & batch.mask
    assert (
        metrics["sft_loss"] == metrics["member_nll"] == pytest.approx(-float(logp[taught].mean()), rel=1e-5)
    )
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5) and metrics["sampler_diff_max"] < 1e-4
    shown = 2 * sum(map(len, ANSWERS))
    assert metrics["num_tokens"] == int(batch.mask.sum()) and metrics["off_policy_share"] == pytest.approx(
        shown / int(batch.mask.sum())
    )
    assert metrics["tokens"] == int(batch.mask.sum()) - shown


def test_tokens_of_one_kind_keep_their_sequences():
    t = replace(tokens(), kind=torch.tensor([0] * 7 + [2] * 18 + [0] * 15))
    own = only(t, OWN)
    assert own.cu_seqlens.tolist() == [0, 7, 7, 7, 22] and torch.equal(
        own.logp, torch.cat([t.logp[:7], t.logp[25:]])
    )


# --- options ------------------------------------------------------------------------------------------
def chosen(**changes):
    return choose_mixture(configured(Hybrid, **{"model": "m"} | changes))


def test_options_change_a_row():
    """Wrong implementations: an option of 0 taken for none; --rl that loses the hybrid's own part."""
    row = choose_mixture(
        configured(Hybrid, model="m", algorithm="hpt", gate=0.25, sft_coef=0.0, rl="dapo", kl_coef=0.1)
    )
    assert row.rule.params == {"gate": 0.25, "sft_coef": 0.0} and row.supervised == HYBRIDS["hpt"].supervised
    policy = row.policy
    assert (policy.surrogate, policy.aggregate, policy.kl, policy.kl_coef) == (
        ALGORITHMS["dapo"].surrogate,
        ALGORITHMS["dapo"].aggregate,
        "k3",
        0.1,
    )
    assert choose_mixture(
        configured(Hybrid, model="m", algorithm="luffy", gamma=0.5)
    ).member.surrogate.params == {"gamma": 0.5}
    assert chosen(algorithm="srft", rl="dr_grpo").policy.prepare == (uncertain,)
    assert chosen(rl="gspo").level == "sequence" and chosen().level == "token"
    assert chosen() == HYBRIDS["hpt"] and HYBRIDS["srft"].level == "sequence"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "grpo"},
            "--algorithm: expected one of hpt, hpt_soft, luffy, srft, chord, chord_phi, mixed; got 'grpo'",
        ),
        ({"rl": "sft"}, "--rl: expected one of grpo, .*; got 'sft'"),
        ({"gate": 1.5}, "--gate: expected a share of completions in .0, 1., got 1.5"),
        ({"gamma": 0.1}, "--gamma: hpt has no such option; take an --algorithm that has it: luffy"),
        (
            {"algorithm": "luffy", "gate": 0.0},
            "--gate: luffy has no such option; take an --algorithm that has it: hpt",
        ),
        (
            {"algorithm": "mixed", "mu": 0.5},
            "--mu: mixed has no such option; take an --algorithm that has it: chord, chord_phi",
        ),
        ({"algorithm": "chord", "mu_warmup": -1}, "--mu-warmup: expected steps, 0 or more, got -1"),
        ({"semantics": "trl"}, "--semantics: trl is a preset of a row of --rl; give --rl"),
        ({"epsilon": 0.1}, "--epsilon: hpt has no such bound"),
        (
            {"group_statistics": "own"},
            "--group-statistics: hpt has no such option; take an --algorithm that has it: luffy, srft",
        ),
        (
            {"algorithm": "luffy", "group_statistics": "own", "advantage": "rank"},
            "--group-statistics: own goes with .* zscore and center",
        ),
        ({"rl": "luspo", "semantics": "verl"}, "--semantics: verl has no luspo"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        chosen(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refill": 1}, "--refill: expected 0: it drops the unsolved prompts"),
        ({"tail": "carry"}, "--tail: expected finish or cut, got carry"),
        ({"demo_reward": nan}, "--demo-reward: expected a finite number, got nan"),
        ({"solved": nan}, "--solved: expected a number that is not NaN, got nan"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "--multi-objective-aggregation: expected sum_then_normalize",
        ),
        (
            {"sampling": Sampling(temperature=0.5)},
            "--sampling.temperature: expected 1, at which demonstrations and pairs are scored, got 0.5",
        ),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_mixture(configured(Hybrid, **{"model": "m", "algorithm": "luffy"} | changes), HYBRIDS["luffy"])
    check_mixture(Hybrid(model="m"), HYBRIDS["luffy"])
    with pytest.raises(UserError, match="--task: expected a task of one turn"):
        check_mixture(Hybrid(model="m"), HYBRIDS["luffy"], turns=True)


def test_a_weight_that_falls_for_the_rest_of_the_run_reaches_its_end():
    """Wrong implementation: a fall as long as the whole run, the rise included."""
    schedule = Schedule(peak=1.0, end=0.2, warmup=4)
    assert [schedule(step, 10) for step in (0, 4, 10)] == pytest.approx([0.0, 1.0, 0.2])
    assert schedule(7, 10) == pytest.approx(0.6)
