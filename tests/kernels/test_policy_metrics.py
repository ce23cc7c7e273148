"""The metrics of policy_loss against their definitions, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl.kernels.policy_loss import METRICS, SURROGATES, policy_loss

F64 = torch.float64
LOGP = torch.tensor([-1, -0.5, -2, -0.3, -0.7, -1.2], dtype=F64)
OLD = LOGP - torch.tensor([0.5, 0, -0.5, 0.22, 0.2, -0.8], dtype=F64)
REF = torch.tensor([-1.1, -0.7, -1.8, -0.3, -0.6, -1.0], dtype=F64)
ADVANTAGE = torch.tensor([1.0, 1, 1, 1, -1, -1], dtype=F64)
WEIGHT = torch.full((6,), 1 / 6, dtype=F64)
CLIP, CISPO = SURROGATES["clip"], SURROGATES["cispo"]


def test_metrics_by_hand() -> None:
    """Catches means over all rows instead of live ones, the wrong sign of the KL to the old policy, and clip
    sides swapped.
    """
    mask = torch.tensor([True, True, True, True, True, False])
    kappa = torch.tensor([1.0, 1, 1, 1, 2, 1], dtype=F64)
    _, m = policy_loss(
        LOGP,
        OLD,
        ADVANTAGE,
        surrogate="clip",
        token_weight=WEIGHT,
        mask=mask,
        ref_logp=REF,
        correction=kappa,
        entropy=-LOGP,
    )
    d, e = (LOGP - OLD)[:5], (LOGP - REF)[:5]
    r, k = d.exp(), kappa[:5]
    expected = {
        "tokens": 5.0,
        "clip_low": 0.0,
        "clip_high": 0.4,
        "clip_cap": 0.0,
        "ratio_mean": r.mean(),
        "ratio_max": r.max(),
        "approx_kl": (d * d / 2).mean(),
        "old_kl_k1": -d.mean(),
        "old_kl_k3": (r - 1 - d).mean(),
        "ref_kl_k1": e.mean(),
        "ref_kl_k3": ((-e).exp() - 1 + e).mean(),
        "entropy": -LOGP[:5].mean(),
        "advantage_mean": 0.6,
        "weight_mean": (k * r).mean(),
        "weight_sq_mean": (k * r).square().mean(),
        "ess": (k * r).sum() ** 2 / (5 * (k * r).square().sum()),
    }
    assert tuple(m) == METRICS == tuple(expected)
    for name, x in expected.items():
        assert float(m[name]) == pytest.approx(float(x), rel=1e-9), name
    _, m = policy_loss(LOGP, OLD, ADVANTAGE, surrogate=CLIP.with_params(cap=1.21), token_weight=WEIGHT)
    assert [round(float(m[c]) * 6) for c in ("clip_low", "clip_high", "clip_cap")] == [1, 2, 1]
    _, m = policy_loss(
        LOGP, OLD, ADVANTAGE, surrogate=CISPO.with_params(low=0.8, high=1.28), token_weight=WEIGHT
    )
    assert [round(float(m[c]) * 6) for c in ("clip_low", "clip_high", "clip_cap")] == [2, 1, 0]


@pytest.mark.parametrize("mask", [None, torch.zeros(6, dtype=torch.bool)])
def test_nothing_live_gives_zeros(mask: Tensor | None) -> None:
    n = 0 if mask is None else 6
    x = torch.zeros(n, requires_grad=True)
    loss, metrics = policy_loss(
        x,
        x,
        x,
        surrogate="clip",
        token_weight=x,
        ratio="sequence",
        cu_seqlens=torch.tensor([0, n]),
        mask=mask,
        entropy=x,
        entropy_coef=1.0,
    )
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert not torch.stack(list(metrics.values())).any()
