"""policy_loss: the clipped surrogate of T tokens with all its metrics and, with a backward, its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import BOTH, Bench, Case, Cost, Data, Draw, cases, compiled, plain

LOW, HIGH = 0.2, 0.2
REPORTED = (
    "tokens",
    "clip_low",
    "clip_high",
    "ratio_mean",
    "approx_kl",
    "old_kl_k1",
    "old_kl_k3",
    "advantage_mean",
    "weight_sq_mean",
    "ratio_max",
    "ess",
)
CASES = cases(
    "T",
    tiny=(7,),
    quick=(4096,),
    cpu=[(65536,)],
    cuda=[(4194304,), (65536,)],
    slice={"T": 4096},
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (T,), draw = case.sizes("T"), Draw(case)
    logp = draw.normal(T) - 3
    args = {
        "logp": logp,
        "old_logp": logp + draw.normal(T, std=0.1),
        "advantage": draw.normal(T),
        "weight": torch.full_like(logp, 1 / T),
        "mask": draw.below(10, T) > 0,
    }
    return Data(args, wrt=("logp",))


def cost(case: Case) -> Cost:
    """Four vectors and the mask read; the gradient written."""
    (T,) = case.sizes("T")
    return Cost(T * (4 * case.itemsize + 1 + (case.itemsize if case.mode == BOTH else 0)))


def ours(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    loss, metrics = ops.policy_loss(
        logp, old_logp, advantage, surrogate="clip", token_weight=weight, mask=mask
    )
    return loss, *(metrics[name] for name in REPORTED)


def eager(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    """As public trainers write it, without .item(), and with those of our metrics that are distinct here."""
    live = mask.to(logp.dtype)
    drift = logp - old_logp
    ratio = drift.exp()
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    loss = (per_token * weight * live).sum()
    with torch.no_grad():
        count = live.sum().clamp(min=1)
        low = ((ratio < 1 - LOW) & (advantage < 0)).to(logp.dtype)
        high = ((ratio > 1 + HIGH) & (advantage > 0)).to(logp.dtype)
        each = (low, high, ratio, 0.5 * drift.square(), -drift, ratio - 1 - drift, advantage, ratio.square())
        means = [(x * live).sum() / count for x in each]
        return loss, live.sum(), *means, (ratio * live).amax(), means[2].square() / means[-1]


PROVIDERS = {"fastrl": plain(ours), "eager": plain(eager), "torch.compile": compiled(eager)}
BENCH = Bench(
    op="policy_loss",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="policy_loss",
)
