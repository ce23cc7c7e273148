"""gae: advantages and returns of S packed sequences of L tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, Function, Unavailable, cases, plain

GAMMA, LAM = 0.99, 0.95
CASES = cases(
    "S L",
    tiny=(2, 5),
    quick=(16, 64),
    cpu=[(64, 512)],
    cuda=[(512, 1024), (64, 16384)],
    slice={"S": 2, "L": 64},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (S, L), draw = case.sizes("S L"), Draw(case)
    return Data({"reward": draw.normal(S * L), "value": draw.normal(S * L), "cu_seqlens": draw.ends(S, L)})


def cost(case: Case) -> Cost:
    """Two vectors read, two written; the recurrence is a dozen operations a token."""
    S, L = case.sizes("S L")
    return Cost(4 * S * L * case.itemsize)


def ours(reward: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return ops.gae(reward, value, cu_seqlens, gamma=GAMMA, lam=LAM)


def eager(reward: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The usual loop over time steps, backwards, all sequences at once (they are of one length here)."""
    shape = (cu_seqlens.shape[0] - 1, -1)
    r, v = reward.view(shape), value.view(shape)
    following = torch.cat((v[:, 1:], torch.zeros_like(v[:, :1])), 1)
    delta = r + GAMMA * following - v
    last, found = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(delta.shape[1])):
        last = delta[:, t] + GAMMA * LAM * last
        found.append(last)
    advantage = torch.stack(found[::-1], 1).flatten()
    return advantage, advantage + value


def unrolled(case: Case) -> Function:
    raise Unavailable("it unrolls the loop over time steps, which takes minutes to compile")


PROVIDERS = {"fastrl": plain(ours), "eager": plain(eager), "torch.compile": unrolled}
BENCH = Bench(
    op="gae", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="gae"
)
