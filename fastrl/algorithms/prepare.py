"""Token weights computed from whole sequences: the `prepare` column, functions that replace the correction.

prepare(tokens, surrogate) -> (N,) constant weight of the policy term.  It needs every token of each sequence,
so the loss is evaluated once per micro-batch (level="sequence" of `ops.linear_loss`); surrogate, KL and
entropy stay per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.algorithms.sequence import mean, totals
from fastrl.batch.types import Tokens
from fastrl.kernels.surrogates import Surrogate, bounded

Prepare = Callable[[Tokens, Surrogate], Tensor]


def geometric_mean(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """GMPO: the geometric mean of the sequence's clipped ratios, over the token's own clipped ratio, which
    the surrogate multiplies in.

    The clip is one-sided, by the sign of the advantage, with the bounds of the surrogate: clipped tokens
    count in the mean and have no gradient.
    """
    low = math.log1p(-surrogate.params["low"])
    high = math.log1p(surrogate.params["high"])
    d = bounded((tokens.logp - tokens.old_logp).detach())
    d = torch.where(tokens.advantage > 0, d.clamp(max=high), d)
    d = torch.where(tokens.advantage < 0, d.clamp(min=low), d)
    return _times(tokens, (mean(d, tokens) - d).exp())


def gamma_weight(
    tokens: Tokens,
    surrogate: Surrogate,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO: phi(W) = W^k exp(lambda (1 - W)) of the sequence's whole ratio W, correction included; k and
    lambda depend on the sign of A.
    """
    d = bounded((tokens.logp - tokens.old_logp).detach())
    if tokens.correction is not None:
        d = d + tokens.correction.log().clamp(-20.0, 20.0)
    log_w = totals(d, tokens)[0].clamp(-20.0, 20.0)
    up = tokens.advantage >= 0
    k = torch.where(up, k_pos, k_neg)
    rate = torch.where(up, lambda_pos, lambda_neg)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def drop_stale(tokens: Tokens, surrogate: Surrogate, *, threshold: float) -> Tensor:
    """Off-policy sequence mask: 0 for sequences of negative advantage with a mean of recorded - current
    log-prob above `threshold`.
    """
    recorded = tokens.old_logp if tokens.sampler_logp is None else tokens.sampler_logp
    drift = mean((recorded - tokens.logp).detach(), tokens)
    stale = (tokens.advantage < 0) & (drift > threshold)
    return _times(tokens, torch.where(stale, 0.0, 1.0).to(drift.dtype))


def _times(tokens: Tokens, factor: Tensor) -> Tensor:
    return factor if tokens.correction is None else tokens.correction * factor
