"""Sequences that begin alike, as the G completions of one prompt do: their common beginning is forwarded
once.

Norms, projections and MLP run on the U tokens that are different; attention alone sees every sequence whole,
its queries, keys and values copied from them, and its outputs are kept once.  With prompts of N tokens and
completions of M that saves (G - 1) N of the G (N + M) tokens in every matrix product, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.types import Batch

LEAST = 16  # copying queries, keys and values pays for itself once one token in so many is spared


@dataclass(frozen=True, slots=True)
class Copies:
    """Rows of an array (U, ...) by index (N,), some of them several times.

    parts   places 0..N-1, cut so that none takes a row twice: the gradients of copies are added part by part,
            always in that order
    """

    index: Tensor
    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, index: Tensor, rank: Tensor) -> Copies:
        """`rank` (N,) counts the earlier copies of the same row."""
        order = rank.argsort(stable=True)
        return cls(index, order.split(torch.bincount(rank).tolist()))

    def take(self, x: Tensor) -> Tensor:
        """The rows, (N, ...)."""
        taken: Tensor = _Take.apply(x, self)
        return taken


class _Take(torch.autograd.Function):
    """index_select whose backward adds without atomics: the same bits in every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.shape = copies, x.shape
        return x.index_select(0, copies.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), copies = grads, ctx.copies
        out = grad.new_zeros(ctx.shape)
        for part in copies.parts:
            out.index_add_(0, copies.index[part], grad.index_select(0, part))
        return out, None


@dataclass(frozen=True, slots=True)
class Shared:
    """A batch with its common beginnings taken once.

    tokens, positions   (U,)   what is forwarded
    row                 (T,)   where each token of the batch is among them; a sequence's last loss token,
                        which predicts nothing, is not
    rank                (T,)   how many sequences before it share the token
    whole               the tokens of all sequences, from the U
    first               (U,)   the place of each of the U in `whole`
    cu_seqlens          (S+1,) int32, ends of the sequences in `whole`, of at most max_seqlen tokens
    """

    tokens: Tensor
    positions: Tensor
    row: Tensor
    rank: Tensor
    whole: Copies
    first: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the U tokens, for `Decoder.forward`."""
        q, k, v = (self.whole.take(x) for x in (q, k, v))
        return ops.attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen).index_select(0, self.first)

    def hidden(self, model: Any, rows: Tensor) -> Tensor:
        """Hidden states of the batch's tokens `rows`, (N, D)."""
        hidden = model(self.tokens, None, positions=self.positions, attend=self.attend)
        return Copies.of(self.row[rows], self.rank[rows]).take(hidden)


def shared(batch: Batch) -> Shared | None:
    """What neighbouring sequences have in common before their first loss token, taken once; None when that is
    next to nothing.

    Only whole beginnings of the same length are compared: those of one prompt.  Waits for the device.
    """
    cu, device = batch.cu_seqlens.long(), batch.tokens.device
    S, T = len(batch), batch.tokens.numel()
    starts, lengths = cu[:-1], cu.diff()
    seq = torch.repeat_interleave(torch.arange(S, device=device), lengths, output_size=T)
    position = torch.arange(T, device=device) - starts[seq]
    seen = torch.cat([cu.new_zeros(1), batch.mask.cumsum(0)])  # loss tokens before each place
    begins = seen[1:] == seen[starts][seq]
    prompt = torch.zeros_like(starts).index_add_(0, seq, begins.long())
    before = starts - torch.roll(starts, 1)  # from a sequence to its neighbour on the left
    # the same place there, where it has one
    there = (torch.arange(T, device=device) - before[seq]).clamp(0, T - 1)
    other = (batch.tokens != batch.tokens[there]) & begins
    differs = torch.zeros_like(starts).index_add_(0, seq, other.long())
    alike = (differs == 0) & (prompt == torch.roll(prompt, 1)) & (torch.arange(S, device=device) > 0)
    if LEAST * int(prompt[alike].sum()) <= T:
        return None
    leader = torch.where(alike, 0, torch.arange(S, device=device)).cummax(0).values
    rank = torch.where(begins, seq - leader[seq], 0)
    last = (position == lengths[seq] - 1) & ~begins
    kept = (rank == 0) & ~last
    number = kept.cumsum(0) - 1
    row = torch.where(begins, number[starts[leader[seq]] + position], number)
    stays = (~last).nonzero().squeeze(1)
    ends = torch.cat(
        [cu.new_zeros(1), (lengths - torch.zeros_like(lengths).index_add_(0, seq, last.long())).cumsum(0)]
    )
    return Shared(
        tokens=batch.tokens[kept],
        positions=position[kept],
        row=row,
        rank=rank,
        whole=Copies.of(row[stays], rank[stays]),
        first=kept[stays].nonzero().squeeze(1),
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=int(ends.diff().max()),
    )
