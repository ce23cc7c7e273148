"""token_logp: log-probability and entropy of each target token, from logits (T, V)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench import peers
from fastrl.bench.common import BOTH, Bench, Case, Cost, Data, Draw, Function, cases, compiled, plain, wide

CASES = cases(
    "T V",
    tiny=(5, 37),
    quick=(64, 32000),
    cpu=[(512, 32000)],
    cuda=[(8192, 151936), (8192, 32000), (8192, 50257), (65536, 32000)],
    slice={"T": 32},
)


def data(case: Case) -> Data:
    (T, V), draw = case.sizes("T V"), Draw(case)
    args = {"logits": draw.normal(T, V, std=2.0), "target": draw.below(V, T)}
    return Data(args, wrt=("logits",), upstream=tuple(draw.normal(T, dtype=torch.float32) for _ in range(2)))


def cost(case: Case) -> Cost:
    """The logits are read once; a backward reads them again and writes as much."""
    T, V = case.sizes("T V")
    return Cost(T * V * case.itemsize * (3 if case.mode == BOTH else 1))


def ours(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    found = ops.token_logp(logits, target, entropy=True, **options)
    assert found.entropy is not None
    return found.logp, found.entropy


def in_place(case: Case) -> Function | None:
    return None if case.mode != BOTH else lambda logits, target: ours(logits, target, inplace_backward=True)


def eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = wide(logits).log_softmax(-1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


PROVIDERS = {
    "fastrl": plain(ours),
    "fastrl in place": in_place,
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "trl": peers.trl_from_logits,
    "liger (no entropy)": peers.liger_from_logits,
    "flash-attn (no entropy)": peers.flash_attn_from_logits,
    "quack (no entropy)": peers.quack_from_logits,
}
BENCH = Bench(
    op="token_logp",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="token_logp",
    mutates={"fastrl in place": ("logits",)},
)
