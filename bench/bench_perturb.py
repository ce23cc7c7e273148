"""perturb: one step of projected gradient ascent (l2, a ball per sequence) on embeddings (B, L, D), in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import FORWARD, Bench, Case, Cost, Data, Draw, cases, compiled, plain

STEP, RADIUS = 0.1, 0.3
CASES = cases(
    "B L D",
    tiny=(2, 3, 8),
    quick=(4, 64, 64),
    cpu=[(8, 512, 256)],
    cuda=[(8, 4096, 4096), (8, 512, 1024)],
    slice={"B": 2, "L": 64},
    modes=(FORWARD,),
    cuda_dtype="float32",
)


def data(case: Case) -> Data:
    (B, L, D), draw = case.sizes("B L D"), Draw(case)
    return Data({"delta": draw.normal(B, L, D, std=0.5 * RADIUS * (L * D) ** -0.5), "grad": draw.normal(B, L, D)})


def cost(case: Case) -> Cost:
    """Both tensors read for the norms and again for the step, one written."""
    B, L, D = case.sizes("B L D")
    return Cost(5 * B * L * D * case.itemsize)


def ours(delta: Tensor, grad: Tensor) -> Tensor:
    return ops.perturb_step(delta, grad, step_size=STEP, radius=RADIUS, norm="l2", scope="sequence")


def eager(delta: Tensor, grad: Tensor) -> Tensor:
    """FreeLB's step."""
    moved = delta + STEP * grad / grad.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]
    norm = moved.flatten(1).norm(dim=1)
    return moved * torch.where(norm > RADIUS, RADIUS / norm, 1.0)[:, None, None]


PROVIDERS = {"fastrl": plain(ours), "eager": plain(eager), "torch.compile": compiled(eager)}
BENCH = Bench(
    op="perturb",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="perturb_step",
    mutates={"fastrl": ("delta",)},
)
