"""sample: one token for each of B rows of logits, with its log-probability and the entropy.

top_k 0 keeps the whole vocabulary, and so does top_p of 100 (percent).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import (
    FORWARD,
    Bench,
    Case,
    Cost,
    Data,
    Draw,
    Function,
    cases,
    compiled,
    only,
    peer,
    plain,
)

CASES = cases(
    "B V top_k top_p",
    tiny=(3, 37, 4, 90),
    quick=(16, 8192, 0, 100),
    cpu=[(256, 32000, 0, 100), (256, 32000, 50, 100), (256, 32000, 0, 90)],
    cuda=[
        (256, 151936, 0, 100),
        (64, 151936, 0, 100),
        (256, 151936, 50, 100),
        (256, 151936, 0, 90),
        (64, 151936, 50, 90),
    ],
    slice={"B": 8},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (B, V, top_k, top_p), draw = case.sizes("B V top_k top_p"), Draw(case)
    row = torch.arange(B, device=draw.device)
    return Data({"logits": draw.normal(B, V, std=2.0), "row": row, "top_k": top_k, "top_p": top_p / 100})


def cost(case: Case) -> Cost:
    """The logits are read once, and once more for filters.

    There are no matrix products, but about 60 operations a logit, most for its noise.
    """
    B, V, top_k, top_p = case.sizes("B V top_k top_p")
    return Cost(B * V * case.itemsize * (2 if top_k or top_p < 100 else 1))


def ours(logits: Tensor, row: Tensor, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    drawn = ops.sample(logits, seed=0, sequence=row, position=row, top_k=top_k, top_p=top_p)
    return drawn.entropy, drawn.logp, drawn.behaviour_logp, drawn.token


def entropy(logits: Tensor, **_: Any) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def warped(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """As transformers' logits warpers do it."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return logits


def eager(logits: Tensor, row: Tensor, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    """Filter, softmax, multinomial, gather; the entropy and the first log-prob are before the filters."""
    log_p = logits.log_softmax(-1)
    p = warped(logits, top_k, top_p).softmax(-1)
    token = torch.multinomial(p, 1)
    logp = log_p.gather(1, token).squeeze(1)
    behaviour = p.gather(1, token).squeeze(1).log() if top_k or top_p < 1 else logp
    return -(log_p.exp() * log_p).sum(-1), logp, behaviour, token.squeeze(1)


def transformers(case: Case) -> Function | None:
    """Its own warpers, for cases with filters."""
    top_k, top_p = case.sizes("top_k top_p")
    if not top_k and top_p == 100:
        return None
    warpers = [peer("transformers", "TopKLogitsWarper")(top_k)] if top_k else []
    warpers += [peer("transformers", "TopPLogitsWarper")(top_p / 100)] if top_p < 100 else []

    def call(logits: Tensor, row: Tensor, **_: Any) -> tuple[Tensor, ...]:
        log_p, kept = logits.log_softmax(-1), logits
        for warper in warpers:
            kept = warper(row, kept)
        p = kept.softmax(-1)
        token = torch.multinomial(p, 1)
        chosen = (x.gather(1, token).squeeze(1) for x in (log_p, p))
        return -(log_p.exp() * log_p).sum(-1), *chosen, token.squeeze(1)

    return call


def flashinfer(case: Case) -> Function:
    """The token alone."""
    only(case.device == "cuda", "flashinfer's kernels are CUDA only")
    top_k, top_p = case.sizes("top_k top_p")
    name = "top_k_top_p_sampling_from_logits" if top_k or top_p < 100 else "sampling_from_logits"
    draw = peer("flashinfer.sampling", name)

    def call(logits: Tensor, row: Tensor, top_k: int, top_p: float) -> tuple[Tensor, ...]:
        token = draw(logits, top_k or logits.shape[1], top_p) if top_k or top_p < 1 else draw(logits)
        return token[:0], token  # no entropy to compare

    return call


PROVIDERS = {
    "fastrl": plain(ours),
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "transformers": transformers,
    "flashinfer (token only)": flashinfer,
}
BENCH = Bench(
    op="sample",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(entropy),  # the draws are random: the entropy is what can be checked here
    registry="sample",
)
