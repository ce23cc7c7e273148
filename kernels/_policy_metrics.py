"""What policy_loss reports about a batch: one fixed row of numbers, and how the rows of several batches
combine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrl.kernels.surrogates import KLS, Gate

# means over live tokens, unless it says otherwise; r is the ratio the surrogate sees, d and e are per token
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


def measure(
    d: Tensor,
    token_d: Tensor,
    e: Tensor | None,
    gate: Gate | None,
    advantage: Tensor,
    correction: Tensor,
    entropy: Tensor,
    mask: Tensor,
) -> Tensor:
    """The metrics (M,) of T tokens in the order of METRICS; `d` as the surrogate sees it, correction, entropy
    and mask empty where absent.

    Masked-out rows hold finite numbers.  One stack and one sum, because each small call costs more than its
    arithmetic.
    """
    none = torch.zeros_like(d)
    live = mask.to(d.dtype) if mask.numel() else torch.ones_like(d)
    r = d.exp()
    low, high, cap = (x.to(d.dtype) for x in gate) if gate else (none, none, none)
    k1, k3 = (none, none) if e is None else (KLS["k1"](e, d)[0], KLS["k3"](e, d)[0])
    old_k3 = KLS["k3"](-token_d, d)[0]
    weight = r * correction if correction.numel() else r
    h = entropy if entropy.numel() else none
    each = [
        live,
        low,
        high,
        cap,
        r,
        none,
        0.5 * token_d.square(),
        -token_d,
        old_k3,
        k1,
        k3,
        h,
        advantage,
        weight,
        weight.square(),
    ]
    sums = (torch.stack(each) * live).sum(1)
    n = sums[:1]
    mean = sums / n.clamp(min=1)
    top = (r * live).amax(0, keepdim=True) if r.numel() else n
    return torch.cat([n, mean[1:_MAX], top, mean[_MAX + 1 :], _ess(n, mean[-2:-1], mean[-1:])])


def merge_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of a whole batch from those of its parts (chunks, micro-batches, ranks): exactly what one
    call would give.
    """
    rows = torch.stack([torch.stack([part[name] for name in METRICS]) for part in parts])
    tokens = rows[:, :1]
    mean = (rows * tokens).sum(0) / tokens.sum().clamp(min=1)
    merged = dict(zip(METRICS, mean.unbind(), strict=True))
    ess = _ess(tokens.sum(), merged["weight_mean"], merged["weight_sq_mean"])
    return {**merged, "tokens": tokens.sum(), "ratio_max": rows[:, _MAX].amax(), "ess": ess}


def _ess(tokens: Tensor, weight: Tensor, weight_sq: Tensor) -> Tensor:
    return torch.where(tokens > 0, weight.square() / weight_sq, 0)
