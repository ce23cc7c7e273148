"""Padded matrices of sequences and the packed tokens that rows of the family take: random batches, and a
row's loss and gradient.
"""

from __future__ import annotations

import torch
from family import Rect
from torch import Tensor

from fastrl.algorithms import Algorithm, Totals
from fastrl.batch.types import Tokens

F64 = torch.float64
BUDGET = 12


def vector(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def rect(
    lengths: list[int], advantage: list[float], spread: float = 0.4, shift: float = 0.0, seed: int = 0
) -> Rect:
    draw = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths) + 1  # one column of padding, at least
    logp = -3 * torch.rand(shape, generator=draw, dtype=F64)
    old = logp - spread * torch.randn(shape, generator=draw, dtype=F64) - shift
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return Rect(logp, torch.where(mask, old, torch.nan), mask, vector(*advantage)[:, None], BUDGET)


def pack(b: Rect, row: Algorithm, samples: list[int] | None = None, **columns: Tensor) -> Tokens:
    """The tokens of some of the sequences, weighed by the counts of all of them."""
    chosen = list(range(len(b.mask))) if samples is None else samples
    length = b.length.squeeze(1)
    totals = Totals(tokens=int(length.sum()), samples=int((length > 0).sum()), max_length=b.budget)
    weight = row.aggregate(length.to(F64), totals)[:, None].expand_as(b.logp)
    parts = {"old_logp": b.old, "advantage": b.A, "weight": weight} | columns
    flat = {name: torch.cat([x[i][b.mask[i]] for i in chosen]) for name, x in parts.items()}
    ends = torch.tensor([0, *(int(length[i]) for i in chosen)]).cumsum(0).to(torch.int32)
    return Tokens(**flat, cu_seqlens=ends, live=int(ends[-1]))


def loss_and_slope(
    b: Rect, row: Algorithm, samples: list[int] | None = None, **columns: Tensor
) -> tuple[Tensor, Tensor]:
    """The row's loss, and its derivative by every logp of the matrix, through torch.func.vjp as linear_loss
    takes it.
    """
    tokens = pack(b, row, samples, **columns)
    chosen = list(range(len(b.mask))) if samples is None else samples
    logp = torch.cat([b.logp[i][b.mask[i]] for i in chosen])
    loss, pull = torch.func.vjp(lambda x: row.loss(tokens.with_(x, None)), logp)
    (slope,) = pull(torch.ones_like(loss))
    out, at = torch.zeros_like(b.logp), 0
    for i in chosen:
        n = int(b.length[i])
        out[i][b.mask[i]] = slope[at : at + n]
        at += n
    return loss.detach(), out
