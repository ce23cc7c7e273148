"""linear: x W^T of a layer, K inputs and N outputs.  What exact mode runs, cpu or triton, beside the library's own product."""

from __future__ import annotations

from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, plain

CASES = cases(
    "T N K",
    tiny=(5, 7, 12),
    quick=(64, 1024, 128),
    cpu=[(64, 4096, 512), (64, 2048, 512), (64, 512, 2048), (64, 4096, 128), (64, 1024, 128), (64, 128, 512)],  # decoders of width 512, 128
    cuda=[  # gate_up, qkv, down of Qwen2.5-0.5B, and of 1.5B
        *((T, N, K) for T in (256, 64, 1024) for N, K in ((9728, 896), (1152, 896), (896, 4864))),
        *((T, N, K) for T in (64, 256, 1024) for N, K in ((17920, 1536), (2048, 1536), (1536, 8960))),
    ],
    slice={"T": 64},
    modes=(FORWARD,),
)


def data(case: Case) -> Data:
    (T, N, K), draw = case.sizes("T N K"), Draw(case)
    return Data({"x": draw.normal(T, K), "weight": draw.normal(N, K, std=K**-0.5)})


def cost(case: Case) -> Cost:
    """One product; x, W and y once each."""
    T, N, K = case.sizes("T N K")
    return Cost((T * K + N * K + T * N) * case.itemsize, 2 * T * N * K)


def eager(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


PROVIDERS = {"fastrl": plain(ops.linear), "eager": plain(eager)}
BENCH = Bench(op="linear", cases=CASES, data=data, cost=cost, providers=PROVIDERS, truth=plain(eager), registry="linear")
