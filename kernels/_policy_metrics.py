"""The metrics of policy_loss: one fixed row of numbers for a batch, and how the rows of several combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrl.kernels.surrogates import KLS, Gate

# means over live tokens, unless noted; r is the ratio that the surrogate sees, d and e are per token
METRICS = (
    "tokens",  # live tokens, a count
    "clip_low",  # fraction held at the lower bound (clip: of tokens with a negative advantage)
    "clip_high",  # fraction held at the upper bound (clip: of tokens with a positive advantage)
    "clip_cap",  # fraction held at the cap
    "ratio_mean",  # r
    "ratio_max",  # the largest r
    "approx_kl",  # d^2 / 2
    "old_kl_k1",  # -d: estimates KL(old || policy) on tokens the old policy drew
    "old_kl_k3",  # exp(d) - 1 - d: the same, never negative
    "ref_kl_k1",  # e: estimates KL(policy || reference); 0 without ref_logp
    "ref_kl_k3",  # exp(-e) - 1 + e
    "entropy",  # H, nats; 0 without entropy
    "advantage_mean",
    "weight_mean",  # correction * r: the importance weight
    "weight_sq_mean",  # its square
    "ess",  # effective sample size over tokens, weight_mean^2 / weight_sq_mean, in (0, 1]
)
_MAX = METRICS.index("ratio_max")


def policy_metrics(
    d: Tensor,
    token_d: Tensor,
    e: Tensor | None,
    gate: Gate | None,
    advantage: Tensor,
    correction: Tensor,
    entropy: Tensor,
    mask: Tensor,
) -> Tensor:
    """The metrics (M,) of T tokens in the order of METRICS.

    `d` is the log-ratio that the surrogate sees; correction, entropy and mask are empty where absent.
    Masked-out rows hold finite numbers.  There is one stack and one sum, because each small call costs more
    than its arithmetic.
    """
    none = torch.zeros_like(d)
    live = mask.to(d.dtype) if mask.numel() else torch.ones_like(d)
    r = d.exp()
    low, high, cap = (x.to(d.dtype) for x in gate) if gate else (none, none, none)
    k1, k3 = (none, none) if e is None else (KLS["k1"](e, d)[0], KLS["k3"](e, d)[0])
    old_k3 = KLS["k3"](-token_d, d)[0]
    weight = r * correction if correction.numel() else r
    h = entropy if entropy.numel() else none

    clipped = [low, high, cap]
    drift = [0.5 * token_d.square(), -token_d, old_k3, k1, k3]  # approx_kl to ref_kl_k3
    each = [live, *clipped, r, none, *drift, h, advantage, weight, weight.square()]
    sums = (torch.stack(each) * live).sum(1)
    n = sums[:1]
    mean = sums / n.clamp(min=1)
    top = (r * live).amax(0, keepdim=True) if r.numel() else n
    return torch.cat([n, mean[1:_MAX], top, mean[_MAX + 1 :], _ess(n, mean[-2:-1], mean[-1:])])


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of a whole batch from those of its parts (chunks, micro-batches, ranks).

    They are exactly what one call would give.
    """
    rows = torch.stack([torch.stack([part[name] for name in METRICS]) for part in parts])
    tokens = rows[:, :1]
    mean = (rows * tokens).sum(0) / tokens.sum().clamp(min=1)
    merged = dict(zip(METRICS, mean.unbind(), strict=True))
    ess = _ess(tokens.sum(), merged["weight_mean"], merged["weight_sq_mean"])
    return {**merged, "tokens": tokens.sum(), "ratio_max": rows[:, _MAX].amax(), "ess": ess}


def _ess(tokens: Tensor, weight: Tensor, weight_sq: Tensor) -> Tensor:
    return torch.where(tokens > 0, weight.square() / weight_sq, 0)
