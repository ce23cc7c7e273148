"""linear_cross_entropy: the mean cross-entropy of T tokens, from hidden states (T, D) and a weight (V, D)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

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
    only,
    peer,
    plain,
    products,
    wide,
)

CASES = cases(
    "T D V",
    tiny=(5, 16, 37),
    quick=(64, 64, 8192),
    cpu=[(2048, 256, 32000)],
    cuda=[(8192, 4096, 151936), (8192, 2048, 151936), (8192, 896, 151936), (16384, 4096, 128256)],
    slice={"T": 32},
    modes=(BOTH,),
)


def data(case: Case) -> Data:
    (T, D, V), draw = case.sizes("T D V"), Draw(case)
    args = {"hidden": draw.normal(T, D), "weight": draw.normal(V, D, std=D**-0.5), "target": draw.below(V, T)}
    return Data(args, wrt=("hidden", "weight"))


def cost(case: Case) -> Cost:
    """Three products; the weight is read, its gradient written."""
    T, D, V = case.sizes("T D V")
    return Cost(2 * (V * D + T * D) * case.itemsize, 6 * T * D * V)


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(wide(hidden @ weight.T), target)


def torch_chunked(case: Case) -> Function:
    fused, options = (
        peer("torch.nn.functional", "linear_cross_entropy"),
        peer("torch.nn", "LinearCrossEntropyOptions")(),
    )
    return lambda hidden, weight, target: fused(hidden, weight, target, options=options)


def liger(case: Case) -> Function:
    only(case.device == "cuda", "Liger's kernel is Triton: CUDA only")
    fused = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, target: fused(hidden, weight, target)


def trl(case: Case) -> Function:
    chunked = peers.trl_chunked(case)
    return lambda hidden, weight, target: -chunked(hidden, weight, target)[0].mean()


PROVIDERS = {
    "fastrl": plain(ops.linear_cross_entropy),
    "eager": plain(eager),
    PRODUCTS: products,
    "torch.compile": compiled(eager),
    "torch chunked": torch_chunked,
    "liger": liger,
    "trl chunked": trl,
    "cut-cross-entropy": peers.cut_cross_entropy,
    "quack": peers.quack_linear,
}
BENCH = Bench(
    op="linear_cross_entropy",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="token_logp",  # without options the rows are those of token_logp
)
