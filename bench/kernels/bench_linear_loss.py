"""linear_loss: the clipped policy loss of S sequences of L tokens, of which `live` percent count.

It starts from hidden states and the head's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench import peers
from fastrl.bench.common import (
    BOTH,
    PRODUCTS,
    Bench,
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
    "S L D V live",
    tiny=(2, 5, 16, 37, 60),
    quick=(2, 32, 64, 8192, 100),
    cpu=[(8, 256, 256, 32000, 100), (8, 256, 256, 32000, 50)],
    cuda=[
        (16, 512, 4096, 151936, 100),
        (16, 512, 2048, 151936, 100),
        (16, 512, 896, 151936, 100),
        (16, 512, 4096, 151936, 50),
    ],
    slice={"L": 16},
    modes=(BOTH,),
)


def data(case: Case) -> Data:
    (S, L, D, V, live), draw = case.sizes("S L D V live"), Draw(case)
    T = S * L
    hidden, weight, target = draw.normal(T, D), draw.normal(V, D, std=D**-0.5), draw.below(V, T)
    noise = draw.normal(T, std=0.1, dtype=torch.float32)
    rows = draw.normal(T, dtype=torch.float32).argsort()[: T * live // 100].sort().values
    advantage = draw.normal(S, dtype=torch.float32)
    with torch.no_grad():
        old_logp = ops.linear_logp(hidden, weight, target).logp + noise
    args = {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "old_logp": old_logp,
        "advantage": advantage,
        "rows": rows,
    }
    return Data(args, wrt=("hidden", "weight"))


def cost(case: Case) -> Cost:
    """Three products over the live rows; the weight is read, its gradient written."""
    S, L, D, V, live = case.sizes("S L D V live")
    T = S * L * live // 100
    return Cost(2 * (V * D + T * D) * case.itemsize, 6 * T * D * V)


def ours(
    hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, rows: Tensor
) -> Tensor:
    per_token = advantage.repeat_interleave(hidden.shape[0] // advantage.shape[0])
    share = torch.full_like(old_logp, 1 / rows.shape[0])

    def loss(logp: Tensor, entropy: Tensor | None, part: Tensor) -> Tensor:
        return ops.policy_loss(
            logp, old_logp[part], per_token[part], surrogate="clip", token_weight=share[part]
        )[0]

    return ops.linear_loss(hidden, weight, target, loss, mask=rows)[0]


def eager(
    hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, rows: Tensor
) -> Tensor:
    log_p = wide(hidden @ weight.T).log_softmax(-1)
    ratio = (log_p.gather(1, target[:, None]).squeeze(1) - old_logp).exp()
    per_token = advantage.repeat_interleave(hidden.shape[0] // advantage.shape[0])
    return -torch.minimum(ratio * per_token, ratio.clamp(0.8, 1.2) * per_token)[rows].sum() / rows.shape[0]


def liger(case: Case) -> Function:
    module = peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    fused = module(
        beta=0.0,
        compiled=case.level == "full",
        use_ref_model=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
    )

    def call(
        hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, rows: Tensor
    ) -> Tensor:
        shape = (advantage.shape[0], -1)
        mask = torch.zeros_like(old_logp).index_fill_(0, rows, 1.0)
        states = hidden.view(*shape, hidden.shape[1])
        padded = (states, weight, target.view(shape), mask.view(shape), advantage)
        return fused(*padded, old_per_token_logps=old_logp.view(shape))[0]

    return call


def trl(case: Case) -> Function:
    chunked = peers.trl_chunked(case)

    def call(
        hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, rows: Tensor
    ) -> Tensor:
        per_token = advantage.repeat_interleave(hidden.shape[0] // advantage.shape[0])[rows]
        ratio = (chunked(hidden[rows], weight, target[rows])[0] - old_logp[rows]).exp()
        return -torch.minimum(ratio * per_token, ratio.clamp(0.8, 1.2) * per_token).sum() / rows.shape[0]

    return call


PROVIDERS = {
    "fastrl": plain(ours),
    "eager": plain(eager),
    PRODUCTS: products,
    "torch.compile": compiled(eager),
    "liger": liger,
    "trl chunked": trl,
}
BENCH = Bench(
    op="linear_loss",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="token_logp",
)
