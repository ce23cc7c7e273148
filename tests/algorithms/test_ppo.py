"""PPO's pieces against their equations: rewards per token, advantages, the policy's and the critic's loss,
the KL's coefficient.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import actor_critic as restated
import pytest
import torch
from configs import configured
from torch import Tensor

from fastrl import cli
from fastrl.algorithms.ppo import (
    PPO,
    Coefficient,
    advantages,
    kl_of_tokens,
    token_rewards,
    value_loss,
    whiten,
)
from fastrl.batch.types import Tokens
from fastrl.config import Ppo
from fastrl.errors import UserError
from fastrl.methods.ppo.options import choose_ppo
from fastrl.parallel.world import World

ALONE = World().sum
CU = torch.tensor([0, 6, 9, 16, 18], dtype=torch.int32)
# a tool's token, padding, nothing at all
MASK = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
ENDS = torch.tensor([0, 3, 4, 9, 9], dtype=torch.int32)


def loss_of(row, logp: Tensor, old: Tensor, A: Tensor) -> Tensor:
    tokens = Tokens(
        old_logp=old, advantage=A, weight=torch.full_like(logp, 1 / logp.numel()), live=logp.numel()
    )
    return row.loss(tokens.with_(logp, None))


# --- the policy's loss ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "A", "ratio", "want", "slope"),
    [
        ("ppo", [1.0, -1, 2], [0.5, 1, 1.5], -0.633333, [-0.5 / 3, 1 / 3, 0]),
        ("dual_clip", [1.0, -1, -4], [0.5, 1, 10], 4.166667, [-0.5 / 3, 1 / 3, 0]),
        ("ppo", [1.0, -1, -4], [0.5, 1, 10], 13.5, [-0.5 / 3, 1 / 3, 40 / 3]),
    ],
    ids=["clip", "dual clip", "no dual clip"],
)
def test_hand_worked_losses(row, A, ratio, want, slope):
    """NeMo-RL's vectors.  Wrong implementations: the maximum instead of the minimum; the cap on positive
    advantages; no cap.
    """
    logp = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    loss = loss_of(PPO[row], logp, torch.zeros(3, dtype=torch.float64), torch.tensor(A, dtype=torch.float64))
    assert loss.item() == pytest.approx(want, abs=1e-6)
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(("row", "cap"), [("ppo", math.inf), ("dual_clip", 3.0)])
def test_loss_and_gradient_are_those_of_the_equations(row, cap):
    """Wrong implementations: a cap that is the two-sided clip of positive advantages; a gradient through
    clipped tokens.
    """
    generator = torch.Generator().manual_seed(1)
    old, A = (torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = (old + 0.9 * torch.randn(4, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.ones(4, 50, dtype=torch.bool)
    want = restated.policy(leaf, old, A, mask, cap)
    slope = torch.autograd.grad(want, leaf)[0]
    flat = leaf.detach().flatten().requires_grad_()
    loss = loss_of(PPO[row], flat, old.flatten(), A.flatten())
    torch.testing.assert_close(loss, want.detach().reshape(()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, flat)[0], slope.flatten(), rtol=1e-12, atol=1e-12)


# --- rewards and advantages -------------------------------------------------------------------------
def test_rewards_stand_at_the_last_token_that_counts():
    """Wrong implementations: the last token of the sequence, which is a tool's or not the policy's; KL on
    those; its sign.
    """
    kl = torch.where(MASK, torch.arange(18.0) / 10, torch.nan)
    got = token_rewards(torch.tensor([1.0, 2, 3, 4]), kl, 0.5, ENDS, MASK)
    want = torch.where(MASK, -0.05 * torch.arange(18.0), 0)
    want[[5, 7, 15]] += torch.tensor([1.0, 2, 3])
    torch.testing.assert_close(got, want)
    assert token_rewards(torch.ones(4), None, 0.5, ENDS, MASK).nonzero().flatten().tolist() == [5, 7, 15]


def test_the_kl_is_that_of_the_policy_that_sampled():
    """Wrong implementations: reference minus policy; k3 of the other direction.  (algorithms.md A.4.)"""
    e = torch.tensor([0.1, -0.1, 1.0])
    zero = torch.zeros(3)
    assert kl_of_tokens(e, zero, "k1").tolist() == e.tolist()
    assert kl_of_tokens(e, zero, "k3").tolist() == pytest.approx([0.004837, 0.005171, 0.367879], abs=1e-6)


def test_advantages_of_shaped_rewards():
    """Hand-worked, algorithms.md 6.2.  Wrong implementations: gamma where gamma lam belongs; returns of
    whitened advantages.
    """
    reward = token_rewards(
        torch.tensor([1.0]),
        torch.tensor([0.1, 0.2, 0.0]),
        0.1,
        torch.tensor([0, 3]),
        torch.ones(3, dtype=torch.bool),
    )
    value, cu, mask = (
        torch.tensor([0.5, 0.6, 0.7]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.ones(3, dtype=torch.bool),
    )
    row = restated.row(gamma=0.99, lam=0.95, whiten=False)
    raw, returns = advantages(reward, value, cu, mask, row, ALONE)
    assert raw.tolist() == pytest.approx([0.418018575, 0.35515, 0.3], abs=1e-6)
    assert returns.tolist() == pytest.approx([0.918018575, 0.95515, 1.0], abs=1e-6)
    white, same = advantages(reward, value, cu, mask, replace(row, whiten=True), ALONE)
    torch.testing.assert_close(same, returns)
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.97, 0.0)])
def test_packed_advantages_are_the_loops(gamma, lam):
    """Wrong implementations: a carry into the next sequence; the value of a token that does not count;
    whitening over those too.
    """
    generator = torch.Generator().manual_seed(2)
    reward, value = (torch.randn(18, generator=generator, dtype=torch.float64) for _ in range(2))
    value[~MASK] = torch.nan
    row = restated.row(gamma=gamma, lam=lam)
    got = advantages(torch.where(MASK, reward, torch.nan), value, CU, MASK, row, ALONE)
    mask = restated.pad(MASK, CU).bool()
    A, R = restated.gae(restated.pad(reward, CU), restated.pad(value.nan_to_num(0), CU), mask, gamma, lam)
    for ours, theirs in zip(got, (restated.whitened(A, mask), R), strict=True):
        torch.testing.assert_close(restated.pad(ours, CU), theirs, rtol=1e-10, atol=1e-10)


def test_whitening_of_next_to_nothing():
    """Wrong implementations: NaN of one token or of none, or numbers of 1e8 from rounding where all
    advantages are equal.
    """
    none = torch.zeros(3, dtype=torch.bool)
    assert whiten(torch.ones(3), none, ALONE).tolist() == [0, 0, 0]
    assert whiten(torch.full((3,), 7.3), torch.tensor([False, True, False]), ALONE).tolist() == [0, 0, 0]
    assert whiten(torch.full((3,), 0.1), ~none, ALONE).abs().max() < 1e-6


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_a_perfect_critic_leaves_no_advantage_on_average(lam):
    """Two tokens of two choices.  Wrong implementation: a value of the state after the token, which knows
    what was chosen.
    """
    p = [0.3, 0.7]
    R = {(a, b): 2.0 * a - b + 0.5 * a * b for a, b in itertools.product((0, 1), repeat=2)}
    after = {a: sum(p[b] * R[a, b] for b in (0, 1)) for a in (0, 1)}
    start = sum(p[a] * after[a] for a in (0, 1))
    row, mask = restated.row(lam=lam, whiten=False), torch.ones(2, dtype=torch.bool)
    total = torch.zeros(2, dtype=torch.float64)
    for (a, b), score in R.items():
        reward, value = (
            torch.tensor([0.0, score], dtype=torch.float64),
            torch.tensor([start, after[a]], dtype=torch.float64),
        )
        total += p[a] * p[b] * advantages(reward, value, torch.tensor([0, 2]), mask, row, ALONE)[0]
    assert total.abs().max() < 1e-12


# --- the critic's loss ------------------------------------------------------------------------------
def test_hand_worked_value_loss():
    """Wrong implementations: the minimum of the two; the clip around the return; a gradient where the clipped
    error is the larger.
    """
    value = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old, returns, weight = torch.full((3,), 0.5), torch.tensor([1.0, 1, 0]), torch.eye(3)
    for i, (want, slope) in enumerate([(0.045, 0.0), (0.32, -0.8), (0.125, 0.5)]):
        loss, sums = value_loss(value, old, returns, weight[i], 0.2)
        assert loss.item() == pytest.approx(want) and torch.autograd.grad(loss, value)[0][
            i
        ].item() == pytest.approx(slope)
        assert sums.tolist() == pytest.approx([want, 3, 1, 1.6])


@pytest.mark.parametrize("clip", [0.2, 0.5, math.inf])
def test_value_loss_and_gradient_are_those_of_the_equation(clip):
    """Wrong implementations: a missing half; ties whose gradient counts twice;
    an infinite range that is NaN.
    """
    generator = torch.Generator().manual_seed(3)
    value, old, returns = (torch.randn(1, 60, generator=generator, dtype=torch.float64) for _ in range(3))
    value[0, :5] = old[0, :5]
    value.requires_grad_()
    want = restated.critic(value, old, returns, torch.ones(1, 60, dtype=torch.bool), clip)
    got, _ = value_loss(value[0], old[0], returns[0], torch.full((60,), 1 / 60, dtype=torch.float64), clip)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(x, value, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


# --- the coefficient --------------------------------------------------------------------------------
def test_the_adaptive_coefficient():
    """Ziegler's controller.  Wrong implementations: steps counted instead of completions; an error without
    its bounds.
    """
    for kl, want in (
        (9.0, 0.201024),
        (3.0, 0.198976),
        (6.0, 0.2),
        (6.6, 0.2 * (1 + 0.1 * 0.0256)),
        (math.nan, 0.2),
    ):
        beta = Coefficient(0.2, 6.0)
        beta.observe(kl, 256)
        assert beta.value == pytest.approx(want, abs=1e-12)
    beta, want = Coefficient(0.1, 2.0, 100), 0.1
    for kl in (1.0, 5.0, 2.2, -3.0):
        beta.observe(kl, 50)
        want *= 1 + min(max(kl / 2 - 1, -0.2), 0.2) / 2
    assert beta.value == pytest.approx(want)
    fixed = Coefficient(0.1)
    fixed.observe(50.0, 50)
    assert fixed.value == 0.1


# --- options ----------------------------------------------------------------------------------------
def chosen(**options):
    return choose_ppo(configured(Ppo, **{"model": "m", "task": "cards"} | options))


def test_options_change_the_row():
    """Wrong implementations: a KL in both places; a preset that the default of an option undoes; 0 for a clip
    of no width.
    """
    default = chosen()
    assert (default.reward_kl, default.reward_kl_coef, default.kl_coef, default.needs_reference) == (
        "k1",
        0.05,
        0.0,
        True,
    )
    assert (default.gamma, default.lam, default.value_clip, default.policy.surrogate.params["cap"]) == (
        1.0,
        0.95,
        0.2,
        math.inf,
    )
    loss = chosen(kl_in="loss", kl_coef=0.2)
    assert (loss.policy.kl, loss.policy.kl_coef, loss.reward_kl_coef) == ("k2", 0.2, 0.0)
    assert not chosen(kl_coef=0.0).needs_reference
    verl = chosen(semantics="verl", kl="k3", kl_in="loss")
    assert (verl.policy.surrogate.params["cap"], verl.value_clip, verl.lam, verl.policy.kl) == (
        3.0,
        0.5,
        1.0,
        "k3_cut",
    )
    assert chosen(semantics="verl", lam=0.9, value_clip=0.0).lam == 0.9
    assert chosen(value_clip=0.0).value_clip == math.inf and chosen(value_clip=0.3).value_clip == 0.3
    bounds = chosen(epsilon=0.1, epsilon_high=0.3, delta=2.0, entropy_coef=0.01)
    assert (
        bounds.policy.surrogate.params == {"low": 0.1, "high": 0.3, "cap": 2.0}
        and bounds.policy.entropy_coef == 0.01
    )
    assert chosen(critic="shared", vf_coef=0.5).vf_coef == 0.5 and chosen(critic_lr=1e-3).critic_lr == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "grpo"}, "--algorithm: expected one of ppo, dual_clip; got 'grpo'"),
        ({"gamma": 1.5}, r"--gamma: expected a discount in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"--lam: expected a number in \[0, 1\], got -0.1"),
        ({"kl_coef": 0.0, "kl": "k3"}, "--kl: expected no estimator at --kl-coef 0, got k3"),
        ({"kl_target": 0.0}, "--kl-target: expected a positive number of nats, got 0.0"),
        (
            {"kl_target": 6.0, "kl_coef": 0.0},
            "--kl-target: expected none at --kl-coef 0, which stays 0, got 6.0",
        ),
        ({"kl_target": 6.0, "kl_horizon": 31}, "--kl-horizon: expected at least a step's 32, got 31"),
        (
            {"critic": "shared", "critic_lr": 0.1},
            "--critic-lr, --critic-model: expected --critic separate, .* got shared",
        ),
        (
            {"critic": "head", "critic_model": "x"},
            "--critic-lr, --critic-model: expected --critic separate, .* got head",
        ),
        ({"vf_coef": 0.1}, "--vf-coef: expected none with --critic separate, .*, got 0.1"),
        ({"value_clip": -1.0}, "--value-clip: expected a positive number, or 0 for none, got -1.0"),
        ({"delta": 1.1}, "--delta: cap: expected more than"),
        ({"missing_eos_penalty": math.nan}, "--missing-eos-penalty: expected a finite number, got nan"),
        ({"semantics": "nemo"}, "--semantics: expected one of paper, trl, verl; got 'nemo'"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_options_that_do_not_go_together_are_refused(options, message):
    """Wrong implementation: an option that is silently ignored."""
    with pytest.raises(UserError, match=message):
        chosen(**options)


@pytest.mark.parametrize(
    "option", ["--advantage", "--scale-rewards", "--pass-k", "--multi-objective-aggregation"]
)
def test_advantages_of_groups_are_no_option(option, capsys):
    """PPO's come from its critic.  Wrong implementation: an option of `fastrl grpo` that is ignored."""
    assert cli.main(["ppo", "--model", "m", option, "2", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert f"unknown option {option}; it is an option of fastrl grpo, hybrid, joint" in told
