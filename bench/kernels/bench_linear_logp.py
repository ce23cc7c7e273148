"""linear_logp: log-prob and entropy of each target token, from hidden states (T, D) and a weight (V, D)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench import peers
from fastrl.bench.common import (
    BOTH,
    PRODUCTS,
    Bench,
    Builder,
    Case,
    Cost,
    Data,
    Draw,
    Function,
    cases,
    compiled,
    peer,
    plain,
    products,
    wide,
)

CASES = cases(
    "T D V",
    tiny=(5, 16, 37),
    quick=(64, 64, 8192),
    cpu=[(1024, 256, 32000)],
    cuda=[(8192, 4096, 151936), (8192, 2048, 151936), (8192, 896, 151936), (8192, 4096, 128256)],
    slice={"T": 32},
)


def data(case: Case) -> Data:
    (T, D, V), draw = case.sizes("T D V"), Draw(case)
    args = {"hidden": draw.normal(T, D), "weight": draw.normal(V, D, std=D**-0.5), "target": draw.below(V, T)}
    return Data(
        args, wrt=("hidden", "weight"), upstream=tuple(draw.normal(T, dtype=torch.float32) for _ in range(2))
    )


def cost(case: Case) -> Cost:
    """One product for the logits and two for the gradients; ours recomputes the logits, a fourth."""
    T, D, V = case.sizes("T D V")
    passes = 2 if case.mode == BOTH else 1
    return Cost((V * D + T * D) * case.itemsize * passes, 2 * T * D * V * (3 if case.mode == BOTH else 1))


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    found = ops.linear_logp(hidden, weight, target, entropy=True)
    assert found.entropy is not None
    return found.logp, found.entropy


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = wide(hidden @ weight.T).log_softmax(-1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def liger(case: Case) -> Function:
    fused = peer(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    )

    def call(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = fused.apply(hidden, weight, target, 1.0, -100, 1, True)
        return -nll, entropy.float()

    return call


PROVIDERS: dict[str, Builder] = {
    "fastrl": plain(ours),
    "eager": plain(eager),
    PRODUCTS: partial(products, per_token=True),
    "torch.compile": compiled(eager),
    "liger": liger,
    "trl chunked": peers.trl_chunked,
}
BENCH = Bench(
    op="linear_logp",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="token_logp",
)
