"""Training: one optimizer step of supervised fine-tuning on S packed sequences of N tokens, in tokens per second.

The peer is transformers with its own loss, torch's fused AdamW and the same clipping; on CUDA it keeps no float32 masters, ours does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.bench import decoders
from fastrl.bench.common import Bench, Case, Cost, Data, Draw, Function, cases
from fastrl.config import Optim
from fastrl.learner import Learner
from fastrl.types import Batch

CASES = cases(
    "S N L D F H K V",
    tiny=(2, 6, 1, 16, 24, 2, 1, 37),
    quick=(4, 64, 2, 64, 128, 4, 2, 4096),
    cpu=[(8, 256, 4, 256, 512, 8, 4, 32000)],
    cuda=[(16, 512, 24, 896, 4864, 14, 2, 151936)],
    slice={},
    modes=("update",),
)
OPTIM = Optim(lr=1e-5)


def data(case: Case) -> Data:
    (S, N, V), draw = case.sizes("S N V"), Draw(case)
    return Data({"tokens": draw.below(V, S * N), "cu_seqlens": draw.ends(S, N)})


def cost(case: Case) -> Cost:
    """Six FLOPs a parameter and token, and the scores' products; AdamW's traffic is left out."""
    S, N, L, D = case.sizes("S N L D")
    layers, head = decoders.parameters(case)
    return Cost(3 * (layers + head) * case.itemsize, 6 * (layers + head) * S * N + 7 * S * N * N * D * L, tokens=S * N)


def ours(case: Case) -> Function:
    learner = Learner(decoders.ours(case), ALGORITHMS["sft"], OPTIM, steps=1000, micro_tokens=1 << 30)

    def step(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        mask = torch.ones_like(tokens, dtype=torch.bool).index_fill_(0, cu_seqlens[:-1].long(), False)
        zeros = torch.zeros(tokens.shape, device=tokens.device)
        share = torch.full_like(zeros, 1 / (tokens.shape[0] - cu_seqlens.shape[0] + 1))
        batch = Batch(tokens=tokens, cu_seqlens=cu_seqlens, mask=mask, advantage=zeros + 1, old_logp=zeros, weight=share)
        with torch.enable_grad():
            return torch.tensor(learner.update(batch, 0)["loss"])

    return step


def transformers(case: Case) -> Function:
    model = decoders.theirs(case).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, weight_decay=0.0, fused=True
    )

    def step(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        ids = tokens.view(cu_seqlens.shape[0] - 1, -1)
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().cpu()

    return step


def definition(case: Case) -> Function:
    """The loss of the first step, in float64."""
    model = decoders.ours(case, torch.float64)

    def loss(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        predicts = torch.ones_like(tokens, dtype=torch.bool).index_fill_(0, cu_seqlens[1:].long() - 1, False)
        hidden = model(tokens, cu_seqlens)[predicts]
        return -ops.linear_logp(hidden, model.head_weight, tokens.roll(-1)[predicts]).logp.mean().cpu()

    return loss


BENCH = Bench(
    op="train",
    cases=CASES,
    data=data,
    cost=cost,
    providers={"fastrl": ours, "transformers": transformers},
    truth=definition,
    wall=True,
)
PROVIDERS = BENCH.providers
