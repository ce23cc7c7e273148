"""The losses of reward models: each row against its equation in float64, hand-worked values, edges, and TRL's
own trainer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from judging import judged, random_groups, restated

from fastrl.algorithms.reward import REWARD_LOSSES, RewardLoss
from fastrl.methods.reward.objective import merge

try:
    from trl import RewardTrainer

    no_trl = ""
except ImportError as error:
    no_trl = f"no TRL (the peers extra): {error}"

COMPARED = [name for name, row in REWARD_LOSSES.items() if row.compares]


def step(row: RewardLoss, groups, dtype=torch.float64):
    """The loss of groups (scores, targets, margin) as one step, its gradient by the scores, and the step's
    metrics.
    """
    it = judged(groups, total=float(sum(row.units(y) for _, y, _ in groups)) or 1.0, dtype=dtype)
    loss, sums = row.measure(it)
    loss.backward()
    score = it.score.detach()
    ends = torch.stack([score.amin(), score.amax()]).double()
    tokens = ends.new_tensor([float(score.numel())])
    return loss.item(), it.score.grad, merge([torch.cat([sums, ends, tokens]).tolist()])


# --- the equations ----------------------------------------------------------------------------------
@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_value_and_gradient_are_the_equations(name, center):
    """Wrong implementations: groups or pairs of unequal number weighed by their size; ties compared; the
    margin's sign, or none at all; denominators that count groups which say nothing; centring of pairs by
    their sum's absolute value, or of each reward alone.
    """
    row = replace(REWARD_LOSSES[name], center=center if REWARD_LOSSES[name].compares else 0.0)
    groups = random_groups(name)
    loss, grad, _ = step(row, groups)
    want, slope = restated(name, groups, row.center)
    assert loss == pytest.approx(want, rel=1e-13)
    assert torch.allclose(grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("margin", "center", "loss", "slope"),
    [(0.0, 0.0, 0.371101, 0.310026), (0.5, 0.0, 0.554355, None), (0.0, 0.01, 0.371501, None)],
)
def test_a_pair_worked_by_hand(margin, center, loss, slope):
    """Rewards 0.5 and -0.3.  Wrong implementations: a margin that is added to the difference; the mean of two
    squares for the centre.
    """
    row = replace(REWARD_LOSSES["bradley_terry"], center=center)
    got, grad, _ = step(row, [([0.5, -0.3], [1.0, 0.0], margin)])
    assert got == pytest.approx(loss, abs=5e-7)
    if slope is not None:
        assert grad.tolist() == pytest.approx([-slope, slope], abs=5e-7)


def test_equal_rewards_cost_the_logarithm_of_the_orders():
    """A pair ln 2 with gradients of a half, K in a ranking ln K!.  Wrong implementation: the last of a
    ranking chosen from itself and another; a mean over K choices.
    """
    loss, grad, _ = step(REWARD_LOSSES["bradley_terry"], [([3.0, 3.0], [1.0, 0.0], 0.0)])
    assert loss == pytest.approx(math.log(2), rel=1e-15) and grad.tolist() == [-0.5, 0.5]
    loss, _, _ = step(REWARD_LOSSES["plackett_luce"], [([0.7] * 4, [4.0, 3.0, 2.0, 1.0], 0.0)])
    assert loss == pytest.approx(math.log(24), rel=1e-14)


def test_a_ranking_worked_by_hand():
    """Wrong implementations: targets read as ranks, so that the lowest is best; the order of the list taken
    for the ranking.
    """
    scores = [0.5, 0.2, -0.3, -0.3]
    loss, grad, _ = step(REWARD_LOSSES["plackett_luce"], [(scores, [9.0, 7.0, 5.0, 3.0], 0.0)])
    assert loss == pytest.approx(2.458104, abs=5e-7)
    assert grad.tolist() == pytest.approx([-0.621137, -0.267469, -0.055697, 0.944303], abs=5e-7)
    shuffled, _, _ = step(
        REWARD_LOSSES["plackett_luce"], [([-0.3, 0.5, -0.3, 0.2], [3.0, 9.0, 5.0, 7.0], 0.0)]
    )
    assert shuffled == pytest.approx(loss, rel=1e-14)
    pairs, _, _ = step(REWARD_LOSSES["bradley_terry"], [(scores, [9.0, 7.0, 5.0, 3.0], 0.0)])
    assert pairs == pytest.approx(0.489643, abs=5e-7)


def test_a_ranking_of_two_is_a_pair():
    groups = [(r, y, 0.0) for r, y, _ in random_groups("bradley_terry", 40) if len(r) == 2]
    (a, g, _), (b, h, _) = (step(REWARD_LOSSES[name], groups) for name in ("bradley_terry", "plackett_luce"))
    assert len(groups) > 3 and a == pytest.approx(b, rel=1e-14) and torch.allclose(g, h, rtol=1e-13)


# --- invariance and edges ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMPARED)
def test_only_differences_count_without_centring(name):
    """In float32, where 1024 + r keeps r exactly.  Wrong implementations: exponentials of the rewards
    themselves, which overflow; a log-sum-exp less a score, which loses the digits behind the offset.  With
    centring the offset does count.
    """
    groups = [([round(64 * s) / 64 for s in r], y, m) for r, y, m in random_groups(name)]
    moved = [([s + 1024 for s in r], y, m) for r, y, m in groups]
    (a, g, _), (b, h, _) = (step(REWARD_LOSSES[name], x, torch.float32) for x in (groups, moved))
    assert a == b and torch.equal(g, h) and g.sum().abs() < 1e-6
    assert step(replace(REWARD_LOSSES[name], center=0.01), moved)[0] > a + 1000


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_far_rewards_stay_finite(name):
    """Wrong implementations: log(sigmoid(x)) is -inf at -1000; its gradient is NaN; log(1 - sigmoid(x))."""
    loss, grad, _ = step(REWARD_LOSSES[name], [([-1000.0, 1000.0], [1.0, 0.0], 0.0)], torch.float32)
    verdicts = not REWARD_LOSSES[name].compares
    assert loss == (1000 if verdicts else 2000) and grad.tolist() == ([-0.5, 0.5] if verdicts else [-1, 1])


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("group", [([0.3], [1.0], 0.1), ([0.3, -1.0, 2.0], [5.0, 5.0, 5.0], 0.1)])
def test_a_group_that_compares_nothing_changes_nothing(name, group):
    """One completion, or all tied: no loss, no gradient, no part in the denominators or the centring.  Wrong
    implementations: 0 / 0; a mean over more groups than say anything; log K! for a tie.
    """
    row = replace(REWARD_LOSSES[name], center=0.1)
    other = ([0.2, 0.9, 0.1], [2.0, 1.0, 1.0], 0.0)
    alone, g, kept = step(row, [other])
    loss, grad, metrics = step(row, [group, other])
    assert row.units(group[1]) == 0 and loss == alone and torch.equal(grad[-3:], g) and not grad[:-3].any()
    assert metrics["accuracy"] == kept["accuracy"] and metrics["margin"] == kept["margin"]


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_no_groups_at_all(name):
    loss, grad, _ = (lambda it: (float(REWARD_LOSSES[name].measure(it)[0].detach()), it.score, None))(
        judged([])
    )
    assert loss == 0 and grad.numel() == 0


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_order_and_splitting_do_not_matter(name):
    """Wrong implementations: a denominator of the micro-batch; targets that do not move with their scores."""
    row, groups = (
        replace(REWARD_LOSSES[name], center=0.1 if REWARD_LOSSES[name].compares else 0.0),
        random_groups(name),
    )
    whole, grad, _ = step(row, groups)
    back, turned, _ = step(row, [(r[::-1], y[::-1], m) for r, y, m in groups[::-1]])
    assert back == pytest.approx(whole, rel=1e-13) and torch.allclose(turned.flip(0), grad, rtol=1e-12)
    total = float(sum(row.units(y) for _, y, _ in groups))
    parts = [row.measure(judged(part, total))[0].item() for part in (groups[:4], groups[4:])]
    assert sum(parts) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_gradcheck(name):
    groups = random_groups(name)

    def loss(score):
        return replace(REWARD_LOSSES[name], center=0.1).measure(replace(judged(groups, 5.0), score=score))[0]

    assert torch.autograd.gradcheck(loss, judged(groups).score)


@pytest.mark.parametrize("name", COMPARED)
def test_utilities_are_recovered_from_their_comparisons(name):
    """Free scores fitted to rankings drawn from known utilities.  Wrong implementation: a loss that is
    minimal elsewhere (ranks taken backwards, a ranking's tail that forgets the chosen one).
    """
    noise = torch.Generator().manual_seed(1)
    utility = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    n, K = 4000, 2 if name == "bradley_terry" else 3
    items = torch.rand(n, 6, generator=noise).argsort(1)[:, :K]
    gumbel = -torch.empty(n, K, dtype=torch.float64).exponential_(generator=noise).log()
    target = (utility[items] + gumbel).flatten()
    score = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=50, line_search_fn="strong_wolfe")
    it = replace(judged([([0.0] * K, [0.0] * K, 0.0)] * n, float(n)), target=target)

    def closure():
        optimizer.zero_grad()
        loss = REWARD_LOSSES[name].measure(replace(it, score=score[items.flatten()]))[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (score.detach() - score.detach().mean() - utility).abs().max() < 0.1


# --- metrics ----------------------------------------------------------------------------------------
def test_metrics_of_a_step():
    """Wrong implementations: a tie in rewards counted as won; the margin averaged over groups; a mean of
    micro-batches' means.
    """
    groups = [([1.0, 0.5, 0.5], [2.0, 1.0, 0.0], 0.0), ([-2.0, 1.0], [1.0, 0.0], 0.0)]
    _, _, m = step(REWARD_LOSSES["bradley_terry"], groups)
    assert m["accuracy"] == 2 / 4 and m["margin"] == pytest.approx((0.5 + 0.5 + 0 - 3) / 4)
    assert (m["min_reward"], m["max_reward"]) == (-2, 1) and m["mean_reward"] == pytest.approx(1 / 5)
    assert m["centering"] == pytest.approx(((2 * 2 / 3) ** 2 + (2 * -1 / 2) ** 2) / 2)
    _, _, v = step(REWARD_LOSSES["process"], [([1.0, -0.5, 0.5], [1.0, 0.0, 0.0], 0.0)])
    assert v["accuracy"] == pytest.approx(2 / 3) and v["margin"] == pytest.approx((1 + 0.5 - 0.5) / 3)


# --- TRL --------------------------------------------------------------------------------------------
@pytest.mark.skipif(bool(no_trl), reason=no_trl)
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01, 0.5])
def test_a_step_of_pairs_is_trls(margin, center):
    """Loss, gradient and metrics of TRL's RewardTrainer on the same rewards, its method called as it is."""
    n = 12
    score = torch.randn(2 * n, dtype=torch.float64, requires_grad=True)
    inputs = {"attention_mask": torch.ones(2 * n, 3)} | (
        {"margin": torch.rand(n, dtype=torch.float64)} if margin else {}
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=score[:, None]), inputs)
    (slope,) = torch.autograd.grad(theirs, score)
    margins = inputs["margin"].tolist() if margin else [0.0] * n
    groups = [([score[i].item(), score[n + i].item()], [1.0, 0.0], margins[i]) for i in range(n)]
    ours, grad, metrics = step(replace(REWARD_LOSSES["bradley_terry"], center=center or 0.0), groups)
    assert ours == pytest.approx(theirs.item(), rel=1e-12)
    assert torch.allclose(grad.view(n, 2).T.flatten(), slope, rtol=1e-11, atol=1e-15)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert metrics[name] == pytest.approx(trainer._metrics["train"][name][0], rel=1e-6), name
