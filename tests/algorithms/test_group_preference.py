"""A group's completions against each other: on-policy pairs and lists against their equations, and what they
become for two completions.

tests/helpers/fusions.py restates the equations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from configs import configured
from fusions import NAN, SCORES, compared, contrasted, groups, listwise, on_policy, ordered, side
from preferences import EQUATIONS
from runs import GROUP, decoder, drift, gradient, learner_of, relative
from runs import learner as plain_learner
from torch import Tensor

from fastrl.algorithms import ALGORITHMS
from fastrl.algorithms.aggregate import sequence_sum
from fastrl.algorithms.fusion import FUSIONS
from fastrl.algorithms.group_preference import GroupPreference, Listwise, OnlinePairs
from fastrl.algorithms.preference import PREFERENCES
from fastrl.batch.types import Tokens
from fastrl.config import Hybrid
from fastrl.errors import UserError
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.methods.hybrid.pair_options import choose_hybrid

F64 = torch.float64
DPO = PREFERENCES["dpo"]


def trainer(model, row, micro_tokens=10**6):
    return learner_of(UnitObjective(model, row), model, micro_tokens)


def online(name="dpo", anchor="start", group=GROUP, **pairs) -> GroupPreference:
    return pairs_of(PREFERENCES[name], group, anchor, **pairs)


def pairs_of(preference, group, anchor="start", **pairs) -> GroupPreference:
    return GroupPreference(preference=preference, comparison=OnlinePairs(**pairs), group=group, anchor=anchor)


def list_of(preference, tau=0.5, group=2, anchor="start") -> GroupPreference:
    return GroupPreference(preference=preference, comparison=Listwise(tau), group=group, anchor=anchor)


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# --- pairs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dpo", "ipo", "rpo", "simpo"])
@pytest.mark.parametrize("anchor", ["start", "old"])
@pytest.mark.parametrize(
    ("pairing", "gap"), [("extremes", 0.0), ("all", 0.0), ("all", 0.5), ("extremes", 1.0)]
)
def test_pairs_of_a_group_are_their_equations(name, anchor, pairing, gap):
    """Wrong implementations: worse and better swapped; ties, or completions without a reward, that make
    pairs; a gap that must be exceeded; a mean over groups; another group's completion; the frozen reference
    for the old policy's log-probs.
    """
    model = decoder(dtype=F64)
    row = online(name, anchor=anchor, pairing=pairing, gap=gap)
    source = contrasted(model, row)
    now, batch = groups(model, source, SCORES), source.collect(0, 0).batches[0]
    drift(model, 0.03)
    pairs = [pair for g in now() for pair in ordered(g, anchor == "start", pairing, gap)]
    # a sum is a sum, whatever its terms: as many equal ones as there are tokens
    rows = [[pair[k] for pair in pairs] for k in (0, 1)]
    sides = [side([_spread(x[2], x[3]) for x in xs], [_spread(x[2] - x[1], x[3]) for x in xs]) for xs in rows]
    loss = EQUATIONS[name](*sides).mean()
    metrics, got = gradient(trainer(model, row, 60), batch)
    assert (
        metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        and relative(got, gradient_of(loss, model)) < 1e-6
    )
    assert metrics["pairs/logps/chosen"] == pytest.approx(
        torch.stack([x[2] for x in rows[0]]).mean().item(), rel=1e-6
    )


def _spread(total: Tensor, n: int) -> Tensor:
    return (total / n).expand(n)


def test_what_is_in_no_pair_is_not_forwarded():
    """Wrong implementations: all of a group forwarded for the two of it that count; a group of equals kept;
    pairs of minibatches that share a denominator.
    """
    model = decoder()
    assert len(contrasted(model, online()).collect(0, 0).batches[0]) == 2 * 2, (
        "two of three groups have two different rewards"
    )
    assert len(contrasted(model, online(pairing="all")).collect(0, 0).batches[0]) == 2 * GROUP
    batches = contrasted(model, online(), range(12), minibatches=3, epochs=2).collect(0, 0).batches
    assert [len(b) for b in batches] == [2] * 6 and all((b.weight == 1).all() for b in batches)
    assert all(
        torch.equal(b.advantage[b.cu_seqlens[:-1].long()].diff(), torch.tensor([-3.0])) for b in batches
    ), "the best, then the worst"


@pytest.mark.parametrize(
    "row", [online(), online(pairing="all"), replace(FUSIONS["group_softmax"], group=GROUP)]
)
def test_cutting_changes_nothing(row):
    """Wrong implementations: counts of a micro-batch in a denominator; a group that a micro-batch cuts."""
    model = decoder(dtype=F64)
    batch = contrasted(model, row, range(12)).collect(0, 0).batches[0]
    drift(model, 0.03)
    longest = max(
        int(batch.cu_seqlens[i + row.unit] - batch.cu_seqlens[i]) for i in range(0, len(batch), row.unit)
    )
    (a, g), (b, h) = gradient(trainer(model, row), batch), gradient(trainer(model, row, longest), batch)
    assert relative(h, g) < 1e-12 and b == pytest.approx(a, rel=1e-9)
    with pytest.raises(
        UserError,
        match=f"{row.unit} sequences that belong together, "
        f"of {longest} tokens does not fit into {longest - 1}",
    ):
        gradient(trainer(model, row, longest - 1), batch)


@pytest.mark.parametrize(
    "scores",
    [[1.0, 0.0] * 3, [0.0, 1.0] * 3, [0.0, 1.0, 1.0, 0.0, 0.5, 0.5]],
    ids=["first", "second", "mixed"],
)
def test_with_two_completions_and_a_small_beta_it_is_grpo_of_two(scores):
    """The direction is that of a policy gradient over sums of tokens with advantages of +-1/sqrt 2, and beta
    sqrt 2 its length.

    Wrong implementations: a mean over tokens; a factor that depends on the pair; pairs of as many sequences
    as were drawn taken for these in their order, so that the better one is pushed down wherever it came
    second.
    """
    model = decoder(dtype=F64)
    # pairs are a mean over pairs, GRPO's groups over all
    share = 3 / sum(a != b for a, b in zip(scores[::2], scores[1::2], strict=True))
    two = replace(ALGORITHMS["grpo"], aggregate=sequence_sum, surrogate=ALGORITHMS["rloo"].surrogate)
    for beta in (1e-6, 1e-3):
        row = pairs_of(DPO.with_params(beta=beta), 2)
        mine = contrasted(model, row, scores, group=2).collect(0, 0).batches[0]
        theirs = on_policy(model, two, scores, group=2).collect(0, 0).batches[0]
        g, h = (
            gradient(trainer(model, row), mine)[1],
            gradient(plain_learner(model, two, temperature=1.0), theirs)[1],
        )
        assert 1 - float(torch.nn.functional.cosine_similarity(g, h, dim=0)) < beta**2 + 1e-12
        # of a prompt: beta sigma(0) (s_w - s_l) against A (s_w - s_l) / 2, where A = 1 / sqrt 2 up to the eps
        # of its deviation
        assert float(g.norm() / h.norm()) == pytest.approx(beta * math.sqrt(2) * share, rel=2e-4 + beta)


def test_one_pair_at_any_beta_is_grpo_of_two_times_a_number():
    """That number is beta sigma(-beta Delta).  Wrong implementation: a gradient through the weight of the
    pair.
    """
    model, scores, beta = decoder(dtype=F64), [1.0, 0.0] * 6, 0.7
    two = replace(ALGORITHMS["grpo"], aggregate=sequence_sum, surrogate=ALGORITHMS["rloo"].surrogate)
    row = pairs_of(DPO.with_params(beta=beta), 2)
    source = contrasted(model, row, scores, group=2, prompts=1)
    g = gradient(trainer(model, row), source.collect(0, 0).batches[0])[1]
    h = gradient(
        plain_learner(model, two, temperature=1.0),
        on_policy(model, two, scores, group=2, prompts=1).collect(0, 0).batches[0],
    )[1]
    (one,) = groups(model, source, scores)()
    best, worst = compared(one, True)
    factor = beta * torch.sigmoid(-beta * (best[1] - worst[1])).item()
    assert relative(g, h * factor * 2 * math.sqrt(2)) < 3e-4


# --- lists ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("average", "beta", "tau"), [(False, 0.1, 0.5), (True, 1.0, 0.25)])
@pytest.mark.parametrize("anchor", ["start", "old"])
def test_a_list_is_its_equation(average, beta, tau, anchor):
    """Wrong implementations: a softmax over the whole batch; completions without a reward in it; targets of
    rewards without their temperature; a mean over completions; sums for means.
    """
    model = decoder(dtype=F64)
    row = list_of(replace(DPO.with_params(beta=beta), average=average), tau, GROUP, anchor)
    source = contrasted(model, row)
    now, batch = groups(model, source, SCORES), source.collect(0, 0).batches[0]
    drift(model, 0.03)
    loss = listwise(now(), anchor == "start", beta, tau, average)
    metrics, got = gradient(trainer(model, row, 60), batch)
    assert (
        metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        and relative(got, gradient_of(loss, model)) < 1e-6
    )


def lists(reward: Tensor, score: Tensor, row: GroupPreference) -> tuple[Tensor, Tensor]:
    """The row's loss of completions of one token each, by their log-ratios, and its gradient by them."""
    leaf = score.clone().requires_grad_()
    n = len(score)
    tokens = Tokens(
        old_logp=torch.zeros_like(score),
        advantage=reward,
        weight=torch.ones_like(score) * row.group / n,
        ref_logp=torch.zeros_like(score),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32),
        live=n,
    )
    loss = row.loss(tokens.with_(leaf, None))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_a_list_of_two_with_one_target_is_dpo():
    """Wrong implementations: the temperature on the wrong side; a target that is the worse one."""
    score = torch.tensor([0.5, -0.3], dtype=F64)
    row = list_of(DPO, 1e-3)
    loss, grad = lists(torch.tensor([1.0, 0.0], dtype=F64), score, row)
    assert loss.item() == pytest.approx(0.653947, abs=1e-6) and grad.tolist() == pytest.approx(
        [-0.048001, 0.048001], abs=1e-6
    )
    loss, _ = lists(torch.tensor([0.0, 1.0], dtype=F64), score, row)
    assert loss.item() == pytest.approx(0.653947 + 0.08, abs=1e-6)


def test_the_gradient_of_a_list_is_target_minus_choice():
    """-beta (w - p): at the reference, the softmax-weighted advantage; zero where beta e = r / tau + const,
    the KL-regularised optimum.

    Wrong implementations: a gradient through the targets; a step that does not end; one hot for a soft
    target.
    """
    reward, beta, tau = torch.tensor([0.2, 1.0, 0.5, 0.5], dtype=F64), 0.3, 0.25
    row = list_of(DPO.with_params(beta=beta), tau, 4)
    w = (reward / tau).softmax(0)
    _, grad = lists(reward, torch.zeros(4, dtype=F64), row)
    torch.testing.assert_close(grad, -beta * (w - 0.25))
    assert (4 * w - 1).tolist() == pytest.approx([-0.8757, 2.0501, -0.5872, -0.5872], abs=1e-4), (
        "worked by hand"
    )
    torch.testing.assert_close(
        lists(reward, reward / tau / beta + 3.0, row)[1], torch.zeros(4, dtype=F64), atol=1e-15, rtol=0
    )
    torch.testing.assert_close(
        lists(torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64), row)[1], torch.zeros(4, dtype=F64)
    )


@pytest.mark.parametrize("row", [online(pairing="all", group=4), replace(FUSIONS["group_softmax"], group=4)])
def test_no_gradient_reaches_the_rewards(row):
    """Wrong implementation: targets, or margins, that are differentiated when rewards come from a model."""
    reward = torch.tensor([0.2, 1.0, 0.5, 0.5], dtype=F64, requires_grad=True)
    logp = torch.zeros(4, dtype=F64, requires_grad=True)
    tokens = Tokens(
        old_logp=logp.detach(),
        advantage=reward,
        weight=torch.ones(4, dtype=F64),
        ref_logp=logp.detach(),
        cu_seqlens=torch.arange(5, dtype=torch.int32),
        live=4,
    )
    loss = row.loss(tokens.with_(logp, None))
    by_reward, by_logp = torch.autograd.grad(loss, (reward, logp), allow_unused=True)
    assert by_reward is None and by_logp.abs().sum() > 0


# --- edges ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scores", [[1.0] * 12, [NAN] * 12], ids=["equal", "none"])
def test_nothing_to_compare_is_no_step(scores):
    """Wrong implementations: a pair of equals; a mean over no pairs; a step on AdamW's momentum."""
    model, row = decoder(), online(pairing="all")
    before = [p.clone() for p in model.parameters()]
    batch = contrasted(model, row, scores).collect(0, 0).batches[0]
    assert len(batch) == 0 and trainer(model, row).update(batch, 0)["num_tokens"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_completions_that_do_not_count_are_compared_with_none():
    """With --overlong-filter, one cut off at its budget; everywhere, one without a reward.  Wrong
    implementations: the mask alone, under which a sum over no token is a score of 0; the reward of the next
    sequence for that of an empty one.
    """
    model = decoder()
    for row in (online(), online(pairing="all"), replace(FUSIONS["group_softmax"], group=GROUP)):
        source = contrasted(model, row, range(12), overlong_filter=True, max_new_tokens=3)
        cut = [r == "length" for r in source._sample(0, 0)[0].rollouts.finish_reason]
        assert any(cut) and not all(cut)
        batch = source.collect(0, 0).batches[0]
        if row.unit == 2:
            assert bool((batch.live_ends.diff() > 0).all())
        if len(batch):
            metrics, got = gradient(trainer(model, row), batch)
            assert math.isfinite(metrics["loss"]) and torch.isfinite(got).all()
    score = torch.zeros(3, dtype=F64)
    tokens = Tokens(
        old_logp=score,
        advantage=torch.tensor([1.0, 0.0, 0.5], dtype=F64),
        weight=torch.ones(3, dtype=F64),
        ref_logp=score,
        cu_seqlens=torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32),
        live=3,
    ).with_(score, None)
    reward = online(pairing="all", group=4).compared(tokens).reward
    torch.testing.assert_close(reward, torch.tensor([[1.0, 0.0, NAN, 0.5]], dtype=F64), equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": "ld_dpo"}, "--preference: expected a loss whose token weights .*, got ld_dpo"),
        ({"preference": "kto"}, "--preference: expected a loss of pairs .*, got kto"),
        (
            {"preference": "simpo", "anchor": "old"},
            "--anchor: simpo compares with no reference; leave it out",
        ),
        (
            {"kl_coef": 0.1},
            "--kl-coef: expected none with online_dpo, whose loss compares completions, got",
        ),
        ({"rl": "grpo"}, "--rl: online_dpo has no such option; take .*: hpt, .*, luffy_pairs"),
        (
            {"group_statistics": "own"},
            "--group-statistics: online_dpo has no such .*: luffy, srft",
        ),
        (
            {"demo_reward": 2.0},
            "--demo-reward: online_dpo has no such .*: luffy, srft, grpo_pairs",
        ),
        ({"solved": 0.5}, "--solved: online_dpo has no such option; take .*: hpt, .*"),
        ({"mu": 0.1}, "--mu: online_dpo has no such option; take .*: chord, chord_phi"),
        ({"semantics": "trl"}, "--semantics: no other trainer has online_dpo; remove --semantics"),
        (
            {"tau": 0.1},
            "--tau: online_dpo has no such option; take an --algorithm that has it: group_softmax, "
            "group_softmax_norm",
        ),
        ({"algorithm": "group_softmax", "tau": 0.0}, "--tau: expected a positive number, got 0"),
        (
            {"algorithm": "group_softmax", "preference": "ipo"},
            "--preference: group_softmax has no such option",
        ),
        ({"gap": -1.0}, "--gap: expected a number of 0 or more, got -1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        choose_hybrid(configured(Hybrid, **{"model": "m", "algorithm": "online_dpo"} | changes))


def test_options_change_a_row():
    """Wrong implementations: an option of 0 taken for none; a group of another size than the run's."""
    row = choose_hybrid(
        configured(
            Hybrid,
            model="m",
            algorithm="online_dpo",
            preference="ipo",
            beta=0.5,
            pairing="all",
            gap=0.0,
            anchor="old",
            group=6,
        )
    )
    assert (
        row.preference.params,
        row.comparison.pairing,
        row.comparison.gap,
        row.anchor,
        row.group,
        row.unit,
    ) == (
        {"beta": 0.5},
        "all",
        0.0,
        "old",
        6,
        6,
    )
    assert not row.needs_reference and FUSIONS["online_dpo"].needs_reference
    row = choose_hybrid(configured(Hybrid, model="m", algorithm="group_softmax_norm", beta=2.0, tau=0.1))
    assert (row.preference.params, row.preference.average, row.comparison.tau, row.group) == (
        {"beta": 2.0},
        True,
        0.1,
        8,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1}, "--group: expected at least 2 completions of a prompt, to compare them, got 1"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "--multi-objective-aggregation: expected sum_then_normalize: completions are compared by one "
            "reward",
        ),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        choose_hybrid(configured(Hybrid, model="m", algorithm="online_dpo", **changes))
