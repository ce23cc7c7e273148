"""rms_norm: the norm of x + residual, and that sum, both (T, D)."""

from __future__ import annotations

from torch import Tensor

from fastrl import ops
from fastrl.bench.common import (
    BOTH,
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
    wide,
)

EPS = 1e-6
CASES = cases(
    "T D",
    tiny=(5, 16),
    quick=(256, 512),
    cpu=[(2048, 896)],
    cuda=[(16384, 4096), (8192, 1024), (32768, 4096)],
    slice={"T": 64},
)


def data(case: Case) -> Data:
    (T, D), draw = case.sizes("T D"), Draw(case)
    args = {"x": draw.normal(T, D), "residual": draw.normal(T, D), "weight": draw.normal(D, std=0.1) + 1}
    return Data(args, wrt=("x", "residual", "weight"), upstream=(draw.normal(T, D), draw.normal(T, D)))


def cost(case: Case) -> Cost:
    """Two tensors read and two written; the backward reads three and writes one.  No matrix products."""
    T, D = case.sizes("T D")
    return Cost(T * D * case.itemsize * (8 if case.mode == BOTH else 4))


def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, eps=EPS, residual=residual)


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    h = wide(total)
    return weight * (h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype), total


def torch_fused(case: Case) -> Function:
    norm = peer("torch.nn.functional", "rms_norm")

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, (total.shape[-1],), weight, EPS), total

    return call


def liger(case: Case) -> Function:
    only(case.device == "cuda", "Liger's kernel is Triton: CUDA only")
    fused = peer("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
    return lambda x, residual, weight: fused(x, residual, weight, EPS, in_place=False)


PROVIDERS = {
    "fastrl": plain(ours),
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "torch rms_norm": torch_fused,
    "liger": liger,
}
BENCH = Bench(
    op="rms_norm",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="rms_norm",
)
