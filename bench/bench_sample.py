"""sample: one token for each of B rows of logits, with its log-probability and the entropy; top_k 0 keeps the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, compiled, plain

CASES = cases(
    "B V top_k",
    tiny=(3, 37, 4),
    quick=(16, 8192, 0),
    cpu=[(64, 32000, 0), (64, 32000, 50)],
    cuda=[(256, 151936, 0), (256, 151936, 50)],
    slice={"B": 8},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (B, V, top_k), draw = case.sizes("B V top_k"), Draw(case)
    return Data({"logits": draw.normal(B, V, std=2.0), "row": torch.arange(B, device=draw.device), "top_k": top_k})


def cost(case: Case) -> Cost:
    """The logits are read once."""
    B, V = case.sizes("B V")
    return Cost(B * V * case.itemsize)


def ours(logits: Tensor, row: Tensor, top_k: int) -> tuple[Tensor, ...]:
    drawn = ops.sample(logits, seed=0, sequence=row, position=row, top_k=top_k)
    return drawn.entropy, drawn.logp, drawn.token


def entropy(logits: Tensor, row: Tensor, top_k: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def eager(logits: Tensor, row: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """As in transformers: filter, softmax, multinomial; the log-prob and the entropy are those before the filter."""
    log_p = logits.log_softmax(-1)
    kept = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf) if top_k else logits
    token = torch.multinomial(kept.softmax(-1), 1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(1, token).squeeze(1), token.squeeze(1)


PROVIDERS = {"fastrl": plain(ours), "eager": plain(eager), "torch.compile": compiled(eager)}
BENCH = Bench(
    op="sample",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(entropy),  # the draws are random: the entropy is what can be checked here
    registry="sample",
)
