"""rope: rotary embedding of T tokens' H query and K key heads of width E."""

from __future__ import annotations

import torch
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
)
from fastrl.kernels.rope import rope_tables

CASES = cases(
    "T H K E",
    tiny=(5, 4, 2, 8),
    quick=(256, 8, 2, 64),
    cpu=[(2048, 14, 2, 64)],
    cuda=[(16384, 32, 8, 128), (8192, 14, 2, 64), (32768, 16, 8, 128)],
    slice={"T": 64},
)


def data(case: Case) -> Data:
    (T, H, K, E), draw = case.sizes("T H K E"), Draw(case)
    cos, sin = rope_tables(E, 10000.0, None, T, torch.float32, draw.device)
    args = {
        "q": draw.normal(T, H, E),
        "k": draw.normal(T, K, E),
        "positions": torch.arange(T, device=draw.device),
        "cos": cos,
        "sin": sin,
    }
    return Data(args, wrt=("q", "k"), upstream=(draw.normal(T, H, E), draw.normal(T, K, E)))


def cost(case: Case) -> Cost:
    """Queries and keys are read and written, and so are their gradients.  No matrix products."""
    T, H, K, E = case.sizes("T H K E")
    return Cost(2 * T * (H + K) * E * case.itemsize * (2 if case.mode == BOTH else 1) + T * E * 4)


def eager(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As in transformers: the angles in the dtype of q, halves swapped by a concatenation."""
    c, s = (torch.cat((a[positions], a[positions]), -1)[:, None].to(q.dtype) for a in (cos, sin))
    swapped = (torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) for x in (q, k))
    return tuple(x * c + y * s for x, y in zip((q, k), swapped, strict=True))


def liger(case: Case) -> Function:
    only(case.device == "cuda", "Liger's kernel is Triton: CUDA only")
    fused = peer("liger_kernel.transformers.functional", "liger_rope")

    def call(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        c, s = (torch.cat((a[positions], a[positions]), -1)[None] for a in (cos, sin))
        return tuple(
            x[0].transpose(0, 1) for x in fused(q[None].transpose(1, 2), k[None].transpose(1, 2), c, s)
        )

    return call


PROVIDERS = {
    "fastrl": plain(ops.rope),
    "eager": plain(eager),
    "torch.compile": compiled(eager),
    "liger": liger,
}
BENCH = Bench(
    op="rope",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="rope",
    mutates={"liger": ("q", "k")},
)
