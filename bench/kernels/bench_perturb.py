"""perturb: FreeLB's step (l2, a ball per sequence) on a perturbation (B, L, D) in place.

It runs alone, and with embeds + delta for the next pass.  delta is always fp32; the dtype of a case is that
of the gradient and of the embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import ops
from fastrl.bench.common import EAGER, FORWARD, Bench, Case, Cost, Data, Draw, cases, compiled, plain

STEP, RADIUS = 0.1, 0.3
ADD = "with embeds"
CACHE = 16 * 2**20  # bytes of a sample that may stay in a cache between its two passes
CASES = cases(
    "B L D",
    tiny=(2, 3, 8),
    quick=(4, 64, 64),
    cpu=[(8, 512, 1024)],
    cuda=[(8, 4096, 4096), (8, 512, 1024)],
    slice={"B": 2, "L": 64},
    modes=(FORWARD, ADD),
)


def data(case: Case) -> Data:
    """The mask is full: nothing is padded, so every token costs."""
    (B, L, D), draw = case.sizes("B L D"), Draw(case)
    delta = draw.normal(B, L, D, std=0.5 * RADIUS * (L * D) ** -0.5, dtype=torch.float32)
    args = {
        "delta": delta,
        "grad": draw.normal(B, L, D),
        "mask": torch.ones(B, L, dtype=torch.bool, device=case.device),
    }
    if case.mode == ADD:
        args |= {"embeds": draw.normal(B, L, D), "out": torch.empty(B, L, D, device=case.device)}
    return Data(args)


def cost(case: Case) -> Cost:
    """delta and the gradient are read and delta written; with ADD, embeds are read and the sum written.

    The length of a sample is known only when all of it has been read.  One that does not fit the cache is
    read twice: 16 bytes an element with a bf16 gradient (0.50 ms for 8 x 4096 x 4096 at 4.3 TB/s), against
    10 where it does, or where a ball is one token.
    """
    B, L, D = case.sizes("B L D")
    read = 4 + case.itemsize
    twice = 1 if L * D * read <= CACHE else 2
    return Cost(B * L * D * (read * twice + 4 + (case.itemsize + 4) * (case.mode == ADD)))


def ours(
    delta: Tensor, grad: Tensor, mask: Tensor, embeds: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, ...]:
    moved = ops.perturb_step(
        delta,
        grad,
        step_size=STEP,
        radius=RADIUS,
        norm="l2",
        scope="sequence",
        mask=mask,
        embeds=embeds,
        out=out,
    )
    return (moved,) if out is None else (moved, out)


def eager(
    delta: Tensor, grad: Tensor, mask: Tensor, embeds: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The step as FreeLB's training loop takes it."""
    g = grad.clone().to(delta.dtype) * mask[..., None].to(delta.dtype)
    length = g.flatten(1).norm(dim=1).view(-1, 1, 1).clamp(min=1e-8)
    moved = delta + STEP * g / length
    norm = moved.flatten(1).norm(dim=1)
    beyond = (norm > RADIUS).to(delta.dtype)
    moved = moved * (RADIUS / norm * beyond + (1 - beyond)).view(-1, 1, 1)
    return (moved,) if embeds is None else (moved, embeds.to(delta.dtype) + moved)


PROVIDERS = {"fastrl": plain(ours), EAGER: plain(eager), "torch.compile": compiled(eager)}
BENCH = Bench(
    op="perturb",
    cases=CASES,
    data=data,
    cost=cost,
    providers=PROVIDERS,
    truth=plain(eager),
    registry="perturb_step",
    mutates={"fastrl": ("delta", "out")},
)
