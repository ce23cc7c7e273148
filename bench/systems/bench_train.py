"""Training: one optimizer step of supervised fine-tuning on S packed sequences of N tokens.

The peer is transformers with its own loss, torch's fused AdamW and the same clipping; on CUDA ours keeps
float32 master weights, the peer does not.

MFU is (6 N T + 6 L H E sum s^2) / time / peak: N parameters of matrix products, T tokens, s tokens of each
sequence; causal attention counts half of its square.  The peak is the data sheet's for bf16 where the device
is known, else the measured product's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl.algorithms import ALGORITHMS
from fastrl.batch.types import Batch
from fastrl.bench import decoders
from fastrl.bench.common import Bench, Case, Cost, Data, Draw, Function, cases
from fastrl.bench.decoders import LETTERS, QWEN3_06B, QWEN25_05B
from fastrl.config import Optim
from fastrl.parallel.world import World
from fastrl.train.learner import Learner
from fastrl.train.objective import PolicyObjective
from fastrl.train.optimizer import MasterWeights

PEAKS = {  # dense bf16 FLOP/s; the first entry contained in the name of the device
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}

CASES = cases(
    f"S N {LETTERS}",
    tiny=(2, 6, 1, 16, 24, 2, 1, 8, 37),
    quick=(4, 64, 2, 64, 128, 4, 2, 16, 4096),
    cpu=[(8, 256, 4, 256, 512, 8, 4, 32, 32000)],
    cuda=[(16, 1024, *QWEN3_06B), (16, 512, *QWEN25_05B)],
    slice={},
    modes=("update",),
)
OPTIM = Optim(lr=1e-5)


def data(case: Case) -> Data:
    (S, N, V), draw = case.sizes("S N V"), Draw(case)
    return Data({"tokens": draw.below(V, S * N), "cu_seqlens": draw.ends(S, N)})


def cost(case: Case) -> Cost:
    """The FLOPs of MFU; AdamW's traffic is left out."""
    S, N, L, H, E = case.sizes("S N L H E")
    parameters = sum(decoders.parameters(case))
    return Cost(
        3 * parameters * case.itemsize, 6 * parameters * S * N + 6 * L * H * E * S * N * N, tokens=S * N
    )


def ours(case: Case) -> Function:
    model = decoders.ours(case)
    weights = MasterWeights(model.named_parameters(), OPTIM, steps=1000)
    learner = Learner(PolicyObjective(model, ALGORITHMS["sft"]), weights, World(), micro_tokens=1 << 30)

    def step(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        mask = torch.ones_like(tokens, dtype=torch.bool).index_fill_(0, cu_seqlens[:-1].long(), False)
        zeros = torch.zeros(tokens.shape, device=tokens.device)
        share = torch.full_like(zeros, 1 / (tokens.shape[0] - cu_seqlens.shape[0] + 1))
        batch = Batch(
            tokens=tokens, cu_seqlens=cu_seqlens, mask=mask, advantage=zeros + 1, old_logp=zeros, weight=share
        )
        with torch.enable_grad():
            return torch.tensor(learner.update(batch, 0)["loss"])

    return step


def transformers(case: Case) -> Function:
    model = decoders.theirs(case).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=0.0,
        fused=True,
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


def details(case: Case, function: Function, ms: float) -> dict[str, float]:
    """Model FLOPs utilisation."""
    reached = cost(case).flops / ms * 1e3
    name = torch.cuda.get_device_name() if case.device == "cuda" else ""
    peak = next(
        (value for known, value in PEAKS.items() if known in name),
        decoders.limits(case.device).gemm_tflop_s * 1e12,
    )
    return {"MFU": reached / peak, "TFLOP/s": reached * 1e-12, "peak TFLOP/s": peak * 1e-12}


BENCH = Bench(
    op="train",
    cases=CASES,
    data=data,
    cost=cost,
    providers={"fastrl": ours, "transformers": transformers},
    truth=definition,
    wall=True,
    details=details,
)
PROVIDERS = BENCH.providers
