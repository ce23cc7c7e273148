"""linear: x W^T of a layer, K inputs and N outputs, and its two gradients, beside the library's products.

On CPU float32 runs it by default.  On CUDA exact mode runs it; the default there is the library's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import BOTH, FORWARD, Bench, Case, Cost, Data, Draw, Function, cases, only, plain

DECODE = cases(
    "T N K",
    tiny=(5, 7, 12),
    quick=(64, 1024, 128),
    cpu=[
        (64, 4096, 512),
        (64, 2048, 512),
        (64, 512, 2048),
        (64, 4096, 128),
        (64, 1024, 128),
        (64, 128, 512),
    ],  # decoders of width 512, 128
    cuda=[  # gate_up, qkv, down of Qwen2.5-0.5B, and of 1.5B
        *((T, N, K) for T in (256, 64, 1024) for N, K in ((9728, 896), (1152, 896), (896, 4864))),
        *((T, N, K) for T in (64, 256, 1024) for N, K in ((17920, 1536), (2048, 1536), (1536, 8960))),
    ],
    slice={"T": 64},
    modes=(FORWARD,),
)

LEARN = cases(
    "T N K",
    tiny=(300, 70, 64),
    quick=(512, 1024, 128),
    cpu=[(2048, 4096, 512), (2048, 1536, 512), (2048, 512, 2048), (4096, 1024, 128), (4096, 128, 512)],
    cuda=[(8192, 9728, 896), (8192, 896, 4864)],
    slice={"T": 64},
    modes=(BOTH,),
)
CASES = (*DECODE, *LEARN)


def data(case: Case) -> Data:
    (T, N, K), draw = case.sizes("T N K"), Draw(case)
    return Data(
        {"x": draw.normal(T, K), "weight": draw.normal(N, K, std=K**-0.5)},
        wrt=("x", "weight"),
        upstream=(draw.normal(T, N),),
    )


def cost(case: Case) -> Cost:
    """One product, or three; x, W and y once each, or twice and with their gradients."""
    T, N, K = case.sizes("T N K")
    products = 3 if case.mode == BOTH else 1
    return Cost(products * (T * K + N * K + T * N) * case.itemsize, products * 2 * T * N * K)


def eager(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def onednn(case: Case) -> Function:
    """The product that torch.compile substitutes for a linear layer without gradients."""
    supported = case.device == "cpu" and case.mode == FORWARD
    only(supported, "torch has oneDNN's product for CPU only, and without a gradient")
    only(hasattr(torch.ops.mkldnn, "_linear_pointwise"), "this torch was built without oneDNN")
    return lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


PROVIDERS = {"fastrl": plain(ops.linear), "eager": plain(eager), "onednn": onednn}
BENCH = Bench(
    op="linear", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="linear"
)
