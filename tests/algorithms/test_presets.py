"""Presets against what other trainers compute under the same names, restated here from their sources, one
function per trainer.

Every loss below is minimised, padded, in float64; clamps, reductions and epsilons are written where those
trainers have them.  (TRL itself is called in test_peers.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import configured
from family import Rect
from rects import F64, loss_and_slope, pack, rect, vector
from torch import Tensor

from fastrl.algorithms import ALGORITHMS, Algorithm
from fastrl.algorithms.presets import KL, SEMANTICS
from fastrl.config import Grpo
from fastrl.methods.grpo.options import choose_algorithm

INF = float("inf")


def chosen(semantics: str, name: str, **options: Any) -> Algorithm:
    return choose_algorithm(configured(Grpo, model="m", algorithm=name, semantics=semantics, **options))


# --- verl: core_algos.py ------------------------------------------------------------------------------
def agg_loss(x: Tensor, mask: Tensor, mode: str, budget: int) -> Tensor:
    x, there = torch.where(mask, x, 0), mask.any(1)
    if mode == "token-mean":
        return x.sum() / mask.sum()
    each = x.sum(1)[there] / (mask.sum(1)[there] if mode == "seq-mean-token-mean" else 1)
    return each.mean() / (budget if mode == "seq-mean-token-sum-norm" else 1)


def log_ratio(b: Rect) -> Tensor:
    return torch.where(b.mask, b.d, 0).clamp(-20, 20)


def vanilla(b: Rect, mode: str = "token-mean", low: float = 0.2, high: float = 0.2, c: float = 3.0) -> Tensor:
    """Dual clip, on negative advantages only."""
    r = log_ratio(b).exp()
    clipped = torch.maximum(-b.A * r, -b.A * r.clamp(1 - low, 1 + high))
    return agg_loss(torch.where(b.A < 0, torch.minimum(-b.A * c, clipped), clipped), b.mask, mode, b.budget)


def gspo(b: Rect, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    u = torch.where(b.mask, b.d, 0).sum(1, keepdim=True) / b.mask.sum(1, keepdim=True)
    s = (b.logp - b.logp.detach() + u.detach()).clamp(max=10).exp()
    return agg_loss(
        torch.maximum(-b.A * s, -b.A * s.clamp(1 - low, 1 + high)), b.mask, "seq-mean-token-mean", b.budget
    )


def geo_mean(b: Rect, size: float = 0.4) -> Tensor:
    sign, d = b.A.sign(), torch.where(b.mask, b.d, 0)
    held = sign * torch.minimum(sign * d, sign * d.clamp(-size, size))
    ratio = (torch.where(b.mask, held, 0).sum(1) / (b.mask.sum(1) + 1e-8)).exp()
    return (-b.advantage.squeeze(1) * ratio).mean()


def cispo(b: Rect, low: float, high: float) -> Tensor:
    return agg_loss(
        -log_ratio(b).exp().clamp(1 - low, 1 + high).detach() * b.A * b.logp, b.mask, "token-mean", b.budget
    )


def sapo(b: Rect) -> Tensor:
    tau = torch.where(b.A > 0, torch.ones_like(b.A), 1.05)
    return agg_loss(
        -torch.sigmoid(tau * (log_ratio(b).exp() - 1)) * (4 / tau) * b.A,
        b.mask,
        "seq-mean-token-mean",
        b.budget,
    )


# --- NeMo-RL: ClippedPGLossFn -------------------------------------------------------------------------
def nemo(b: Rect, low: float = 0.2, high: float = 0.2, c: float = INF, use_cispo: bool = False) -> Tensor:
    """token_level_loss: the tokens of the whole step.  Its masked_mean adds 1e-8 to a count."""
    r = torch.where(b.mask, b.d, 0).exp()
    held = r.clamp(1 - low, 1 + high)
    loss = -b.A * held.detach() * b.logp if use_cispo else torch.maximum(-b.A * r, -b.A * held)
    loss = torch.where(b.A < 0, torch.minimum(loss, -b.A * c), loss) if c < INF else loss
    return torch.where(b.mask, loss, 0).sum() / b.mask.sum()


def nemo_sequences(b: Rect) -> Tensor:
    """sequence_level_importance_ratios, token_level_loss off: the gradient goes through the whole sequence's
    ratio.
    """
    length = b.mask.sum(1, keepdim=True)
    r = (torch.where(b.mask, b.d, 0).sum(1, keepdim=True) / length).exp().expand_as(b.logp)
    loss = torch.maximum(-b.A * r, -b.A * r.clamp(1 - 3e-4, 1 + 4e-4))
    return (torch.where(b.mask, loss, 0).sum(1) / length.squeeze(1)).mean()


LOSSES: dict[tuple[str, str], Callable[[Rect], Tensor]] = {
    ("verl", "grpo"): vanilla,
    ("verl", "dr_grpo"): lambda b: vanilla(b, "seq-mean-token-sum-norm"),
    ("verl", "dapo"): lambda b: vanilla(b, high=0.28, c=10.0),
    ("verl", "gspo"): gspo,
    ("verl", "gmpo"): geo_mean,
    ("verl", "cispo"): lambda b: cispo(b, 10.0, 0.2),
    ("verl", "sapo"): sapo,
    ("verl", "rloo"): vanilla,
    ("verl", "reinforce++"): vanilla,
    ("verl", "reinforce++_baseline"): vanilla,
    ("verl", "gpg"): lambda b: agg_loss(-b.logp * b.A, b.mask, "token-mean", b.budget),
    ("nemo", "grpo"): nemo,
    ("nemo", "dr_grpo"): nemo,
    ("nemo", "dapo"): lambda b: nemo(b, high=0.28, c=10.0),
    ("nemo", "gspo"): nemo_sequences,
    ("nemo", "cispo"): lambda b: nemo(b, low=1.0, high=5.0, use_cispo=True),
    ("nemo", "rloo"): lambda b: (
        torch.where(b.mask, -b.A * b.logp, 0).sum() / b.mask.sum()
    ),  # disable_ppo_ratio
    ("nemo", "reinforce++"): nemo,
    ("nemo", "reinforce++_baseline"): nemo,
    ("trl", "dapo"): lambda b: vanilla(b, c=INF),
}


def differentiated(loss: Callable[[Rect], Tensor], b: Rect) -> tuple[Tensor, Tensor]:
    leaf = b.logp.clone().requires_grad_()
    value = loss(Rect(leaf, b.old, b.mask, b.advantage, b.budget))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize(("semantics", "name"), LOSSES)
def test_losses_are_those_of_the_other_trainers(semantics, name):
    """Wrong implementations: the dual clip left out, or on the positive side; CISPO's bound absolute, or of
    another trainer; another reduction; GMPO's sizes taken for bounds of the ratio.
    """
    # of which some tokens, or sequences, are held and some are not
    for spread in (2e-3, 1.5) if name == "gspo" else (0.5, 1.5):
        b = rect([5, 2, 8, 3, 6], [1.3, -0.7, -2.1, 0.4, -0.2], spread=spread)
        got = loss_and_slope(b, chosen(semantics, name))
        # its 1e-8 of a count
        torch.testing.assert_close(got, differentiated(LOSSES[semantics, name], b), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "rloo", "reinforce++", "reinforce++_baseline"]
)
def test_far_drift_is_held_as_verl_holds_it(name):
    """Log-ratios of +-30, of both signs of the advantage: where verl clamps them to +-20, ours may differ by
    what exp(-20) leaves.

    Wrong implementation: a bound that lets a gradient of exp(20) through.
    """
    b = rect([4, 4], [1.0, -1.0])
    b.old[:, :4] = b.logp[:, :4] - vector(30, -30, 0.1, 21)
    got, want = loss_and_slope(b, chosen("verl", name)), differentiated(LOSSES["verl", name], b)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=2.1e-9)


# --- KL -----------------------------------------------------------------------------------------------
def verl_kl(logp: Tensor, ref: Tensor) -> Tensor:
    """low_var_kl."""
    k = (ref - logp).clamp(-20, 20)
    return (k.exp() - k - 1).clamp(-10, 10)


def nemo_kl(logp: Tensor, ref: Tensor) -> Tensor:
    """calculate_kl with weights of 1 that carry the score function's gradient, detached where the input is
    clamped.
    """
    raw, weight = ref - logp, (logp - logp.detach()).exp()
    k = raw.clamp(-20, 20)
    weight = torch.where(raw == k, weight, weight.detach())
    return (weight * (k.exp() - 1 - k)).clamp(-10, 10)


@pytest.mark.parametrize(("semantics", "kl"), [("verl", verl_kl), ("nemo", nemo_kl)])
def test_k3_is_cut_off_as_it_is_there(semantics, kl):
    """Some log-ratios to the reference past the cut on either side, some past the clamp.

    Wrong implementations: the cut of the exponent alone; a gradient where the value is cut; NeMo-RL's KL
    without the score function.
    """
    b = rect([5, 2, 8, 3], [1.3, -0.7, -2.1, 0.4])
    ref = b.logp - torch.linspace(-25, 25, b.logp.numel(), dtype=F64).view_as(b.logp)
    plain, row = chosen(semantics, "grpo"), chosen(semantics, "grpo", kl_coef=0.1)
    with_kl, without = (
        loss_and_slope(b, x, **({"ref_logp": ref} if x.kl_coef else {})) for x in (row, plain)
    )
    want = differentiated(lambda x: 0.1 * torch.where(x.mask, kl(x.logp, ref), 0).sum() / x.mask.sum(), b)
    for got, base, right in zip(with_kl, without, want, strict=True):
        torch.testing.assert_close(got - base, right, rtol=1e-8, atol=1e-10)
    cut = (torch.where(b.mask, kl(b.logp, ref), 0) == 10).sum()
    assert 2 < cut < b.mask.sum() - 2
    assert row.kl == KL[semantics]["k3"]


# --- advantages ---------------------------------------------------------------------------------------
R = vector(0.2, 1, 0.5, 0.5, 0, 1, 0, 0, 1, 0, 0, 1).view(3, 4)
L = vector(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8).view(3, 4)


def verl_whiten(x: Tensor) -> Tensor:
    every = x.flatten().repeat_interleave(L.flatten().long())
    return (x - every.mean()) * torch.rsqrt(every.var(unbiased=True) + 1e-8)


def nemo_whiten(x: Tensor) -> Tensor:
    every = x.flatten().repeat_interleave(L.flatten().long())
    return (x - every.mean()) * ((every - every.mean()).square().mean()).clamp(min=1e-8).rsqrt()


def nemo_group(leave_one_out: bool, normalize: bool) -> Tensor:
    """calculate_baseline_and_std_per_prompt, with its matrix of who counts for whom, and
    GRPOAdvantageEstimator.
    """
    G = R.shape[1]
    among = 1 - torch.eye(G, dtype=F64) if leave_one_out else torch.ones(G, G, dtype=F64)
    n = G - int(leave_one_out)
    mean, square = R @ among / n, R.square() @ among / n
    std = ((square - mean.square()) * (n / (n - 1))).clamp(min=0).sqrt()
    std = torch.where(std < 1e-7, 0, std)  # what rounding leaves of equal rewards
    return torch.where(std > 0, (R - mean) / (std + 1e-6), R - mean) if normalize else R - mean


def center() -> Tensor:
    return R - R.mean(1, keepdim=True)


ADVANTAGES: dict[tuple[str, str], Callable[[], Tensor]] = {
    **{
        ("verl", n): lambda: center() / (R.std(1, keepdim=True) + 1e-6)
        for n in ("grpo", "dapo", "gspo", "gmpo", "cispo", "sapo")
    },
    ("verl", "dr_grpo"): center,
    ("verl", "rloo"): lambda: R * 4 / 3 - R.mean(1, keepdim=True) * 4 / 3,
    ("verl", "reinforce++"): lambda: verl_whiten(R),
    ("verl", "reinforce++_baseline"): lambda: verl_whiten(center()),
    ("verl", "gpg"): lambda: center() * R.numel() / R.count_nonzero(),
    **{("nemo", n): lambda: nemo_group(True, True) for n in ("grpo", "gspo", "cispo")},
    **{("nemo", n): lambda: nemo_group(True, False) for n in ("dr_grpo", "rloo")},
    ("nemo", "dapo"): lambda: nemo_group(False, True),
    ("nemo", "reinforce++"): lambda: nemo_whiten(R),
    ("nemo", "reinforce++_baseline"): lambda: nemo_whiten(center()),
    **{
        ("trl", n): lambda: center() / (R.std(1, keepdim=True) + 1e-4)
        for n in SEMANTICS["trl"]
        if n not in ("lite_ppo", "rloo")
    },
    ("trl", "lite_ppo"): lambda: center() / (R.std() + 1e-4),
    ("trl", "rloo"): lambda: (4 * R - R.sum(1, keepdim=True)) / 3,
}


@pytest.mark.parametrize(("semantics", "name"), ADVANTAGES)
def test_advantages_are_those_of_the_other_trainers(semantics, name):
    """Wrong implementations: another epsilon, or none; a biased deviation where it is not, or the other way
    round; the sample itself in its baseline, or left out of DAPO's; alpha by flat groups.
    """
    row = chosen(semantics, name)
    assert row.advantage is not None
    got = row.advantage(R.flatten(), 4, L.flatten()).view(3, 4)
    # 1e-8 in a variance of 0.2, or not
    torch.testing.assert_close(got, ADVANTAGES[semantics, name](), rtol=5e-8, atol=1e-10)


# --- all of them ----------------------------------------------------------------------------------------
EVERY = [(semantics, name) for semantics, rows in SEMANTICS.items() for name in rows]


@pytest.mark.parametrize(("semantics", "name"), EVERY)
def test_the_first_update_is_the_policy_gradient(semantics, name):
    """Wrong implementations: a preset that names a column that is not there;
    a bound that holds a ratio of 1.
    """
    row = chosen(semantics, name)
    assert row != ALGORITHMS[name] or not SEMANTICS[semantics][name]
    b = rect([5, 1, 8, 3], [1.3, -0.7, -2.1, 0.4], spread=0.0)
    tokens = pack(b, row)
    torch.testing.assert_close(
        loss_and_slope(b, row)[1][b.mask], -tokens.advantage * tokens.weight, rtol=1e-12, atol=0
    )


def test_every_line_of_a_preset_is_checked_against_its_trainer():
    """Wrong implementation: a line that nobody compares.  TRL's losses are called in test_peers.py."""
    assert set(ADVANTAGES) == set(EVERY)
    assert set(LOSSES) >= {pair for pair in EVERY if pair[0] != "trl"}
