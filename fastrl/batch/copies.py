"""Rows taken by index, some of them several times, whose gradients are added in a fixed order.

The backward of `x[index]` adds to the rows of x by index; in deterministic mode CUDA sorts the indices for
that, every time.  The indices of packed sequences are known on the host before anything runs: the inverse is
worked out once, and the backward only gathers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.batch.transfer import send


@dataclass(frozen=True, slots=True)
class Copies:
    """Rows of an array (U, ...) by index (N,), some of them several times.

    parts   on the host: places 0..N-1, cut so that no part takes a row twice; the gradients of copies are
            added part by part, always in that order
    table   on a GPU: (R, M) the places of the copies of each of M rows that have several, at most R; N for
            none
    source  on a GPU: (U,) where a row's gradient is: the place of its only copy, N for a row without, and
            N + 1 + j for the j-th of the M
    """

    index: Tensor
    parts: tuple[Tensor, ...] = ()
    table: Tensor | None = None
    source: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, rank: Tensor) -> Copies:
        """`rank` (N,) counts the earlier copies of the same row.  Both are on the host."""
        order = rank.argsort(stable=True)
        return cls(index, order.split(torch.bincount(rank).tolist()))

    def inverted(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """index, table and source, on the host, for an array of `rows` rows."""
        N = self.index.numel()
        ordered = torch.cat(self.parts) if self.parts else self.index.new_zeros(0)
        ordered = ordered[self.index[ordered].argsort(stable=True)]  # row by row, a row's copies by rank
        taken = self.index[ordered]
        count = torch.bincount(self.index, minlength=rows)
        first = count.cumsum(0) - count

        several = (count > 1).nonzero().squeeze(1)
        number = torch.zeros(rows, dtype=torch.int64).index_copy_(0, several, torch.arange(several.numel()))
        most = int(count.max()) if several.numel() else 0
        table = torch.full((most, several.numel()), N)
        shared = count[taken] > 1
        nth = torch.arange(N) - first[taken]
        table[nth[shared], number[taken][shared]] = ordered[shared]

        source = torch.full((rows,), N)
        source[taken[~shared]] = ordered[~shared]
        source[several] = N + 1 + number[several]
        return self.index, table, source

    def take(self, x: Tensor) -> Tensor:
        """The rows, (N, ...)."""
        taken: Tensor = _Take.apply(x, self)
        return taken

    def add(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the array from those of its copies, (N, ...)."""
        if self.source is not None and self.table is not None:
            return gathered(grad, self.table, self.source)
        out = grad.new_zeros(shape)
        for part in self.parts:
            out.index_add_(0, self.index[part], grad.index_select(0, part))
        return out


def gathered(grad: Tensor, table: Tensor, source: Tensor) -> Tensor:
    """(U, ...) from the gradients (N, ...) of copies, by gathers and one sum over each row's copies.

    The sum runs in float32 or wider and rounds once.
    """
    N, (R, M) = grad.shape[0], table.shape
    padded = grad.new_zeros(N + 1 + M, *grad.shape[1:])  # row N stays 0
    padded[:N] = grad
    if M:
        wide = torch.promote_types(grad.dtype, torch.float32)
        each = padded.index_select(0, table.flatten()).view(R, M, *grad.shape[1:])
        padded[N + 1 :] = each.sum(0, dtype=wide)
    return padded.index_select(0, source)


def place(
    copies: Iterable[Copies], rows: int, others: Iterable[Tensor], device: torch.device
) -> tuple[list[Copies], list[Tensor]]:
    """Copies of an array of `rows` rows, and other host tensors, on `device` by one copy of all."""
    if device.type == "cpu":
        return list(copies), list(others)
    parts = [x for one in copies for x in one.inverted(rows)]
    sent = send([*parts, *others], device)
    triples = [sent[i : i + 3] for i in range(0, len(parts), 3)]
    placed = [Copies(index, (), table, source) for index, table, source in triples]
    return placed, sent[len(parts) :]


class _Take(torch.autograd.Function):
    """index_select whose backward adds without atomics: the same bits in every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.shape = copies, x.shape
        return x.index_select(0, copies.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return ctx.copies.add(grad, ctx.shape), None
