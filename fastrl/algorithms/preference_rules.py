"""Losses of pairs and of labelled examples: the rules of the rows in preference.py.

A rule of pairs takes the scores of N chosen and N rejected completions (c, r); a rule of examples takes N
scores and which of them are good.  It returns N losses.  Scores are log-ratios to the reference, or
log-probs, summed or averaged, as the row says.  Source: the papers named, by their arXiv numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 80.0  # exp() of more overflows float32


# --- functions of the margin c - r ------------------------------------------------------------------
def dpo(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta (c - r)): the pair's negative log-likelihood under Bradley and Terry.  Source:
    2305.18290.
    """
    return -F.logsigmoid(beta * (c - r))


def cdpo(c: Tensor, r: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO with a share e of wrong labels: cross-entropy against (1 - e, e).  Source: E. Mitchell's note on
    cDPO.
    """
    x = beta * (c - r)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(c: Tensor, r: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """An unbiased estimate of DPO's loss when a share e of the labels is flipped; may be negative.  Source:
    2403.00409.
    """
    x, e = beta * (c - r), label_smoothing
    mixed = -(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)
    return mixed / (1 - 2 * e)


def hinge(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta (c - r)).  Source: SLiC 2305.10425, RSO 2309.06657."""
    return F.relu(1 - beta * (c - r))


def ipo(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """(c - r - 1/(2 beta))^2 of length-averaged scores.  Source: 2310.12036 (its tau is beta; its authors'
    code averages).
    """
    return (c - r - 1 / (2 * beta)).square()


def exo(c: Tensor, r: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL of the policy's choice (q, 1 - q) to the labels (1 - e, e).  Source: 2402.00856."""
    x = beta * (c - r)
    log_q, log_not = F.logsigmoid(x), F.logsigmoid(-x)
    kept = log_q.exp() * (log_q - math.log1p(-label_smoothing))
    flipped = log_not.exp() * (log_not - math.log(label_smoothing))
    return kept + flipped


def discopop(c: Tensor, r: Tensor, *, beta: float, tau: float) -> Tensor:
    """Logistic loss blended into the exponential one by sigmoid(x / tau).  Source: 2406.08414."""
    x = beta * (c - r)
    blend = torch.sigmoid(x / tau)
    return (1 - blend) * -F.logsigmoid(x) + blend * (-x).clamp(max=LARGEST).exp()


def simpo(c: Tensor, r: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (c - r) - gamma) of averaged log-probs: a target margin, and no reference.  Source:
    2405.14734.
    """
    return -F.logsigmoid(beta * (c - r) - gamma)


# --- functions of both scores -----------------------------------------------------------------------
def dpop(c: Tensor, r: Tensor, *, beta: float, penalty: float) -> Tensor:
    """DPO with a penalty where the chosen completion is less likely than under the reference.  Source:
    2402.13228.
    """
    return -F.logsigmoid(beta * (c - r - penalty * F.relu(-c)))


def nca(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """Noise-contrastive alignment of a pair.  Source: 2402.05369."""
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)


def bco(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """A binary classifier of chosen against rejected, without its shift.  Source: 2404.04656."""
    return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)


def sppo(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """Self-play preference optimisation with certain wins: the scores regress to +-1/(2 beta).  Source:
    2405.00675.
    """
    return (c - 0.5 / beta).square() + (r + 0.5 / beta).square()


def apo_zero(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """Raises the chosen and lowers the rejected: for chosen completions better than the model's.  Source:
    2408.06266.
    """
    return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)


def apo_down(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """Lowers both, the rejected more: for chosen completions worse than the model's.  Source: 2408.06266."""
    return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))


def orpo(c: Tensor, r: Tensor, *, beta: float) -> Tensor:
    """-beta log sigmoid(log odds(c) - log odds(r)), odds p/(1-p) of the geometric mean probability p =
    exp(score).  Source: 2403.07691.
    """
    return -beta * F.logsigmoid(_log_odds(c) - _log_odds(r))


def _log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(x), x <= 0; at p = 1, where it is infinite, the value at the largest p
    below 1.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps / 2)
    return x - (-torch.expm1(x)).log()


# --- labelled examples ------------------------------------------------------------------------------
def kto(
    score: Tensor,
    good: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    baseline: float,
) -> Tensor:
    """1 - sigmoid(beta (score - z0)) of good examples, 1 - sigmoid(beta (z0 - score)) of bad ones.  Source:
    2402.01306.
    """
    x = beta * (score - baseline)
    return torch.where(good, desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x))


def apo_zero_unpaired(
    score: Tensor, good: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """APO-zero of single examples: KTO with a baseline of 0.  Source: 2408.06266, as TRL has it."""
    return kto(
        score,
        good,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        baseline=0.0,
    )


# --- f-DPO: f'(u) of the ratio u = exp(score) to the reference, up to a constant ----------------------
def forward_kl(score: Tensor) -> Tensor:
    """1 - 1/u.  Source: 2309.16240."""
    return 1 - (-score).clamp(max=LARGEST).exp()


def jensen_shannon(score: Tensor) -> Tensor:
    """log(2u / (1 + u)).  Source: 2309.16240."""
    return math.log(2) + F.logsigmoid(score)


def alpha_divergence(score: Tensor, *, alpha: float = 0.5) -> Tensor:
    """(u^(alpha - 1) - 1) / (alpha - 1); alpha towards 1 is the reverse KL.  Source: 2309.16240."""
    return torch.expm1(((alpha - 1) * score).clamp(max=LARGEST)) / (alpha - 1)
