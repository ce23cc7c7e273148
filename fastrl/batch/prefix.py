"""Common prefixes: sequences that begin alike, as the G completions of one prompt do, forward it once.

Norms, projections and MLP run on the U distinct tokens.  Only attention sees every sequence whole: its
queries, keys and values are copied from the distinct tokens, and its outputs are kept once.  With prompts of
N tokens and completions of M that saves (G - 1) N of the G (N + M) tokens in every matrix product, forward
and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.types import Batch

LEAST = 16  # copying queries, keys and values pays for itself once one token in so many is spared

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> its output


class Attending(Protocol):
    """A model that leaves attention to the caller (`Decoder`)."""

    def __call__(self, tokens: Tensor, cu_seqlens: None, *, positions: Tensor, attend: Attend) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Copies:
    """Rows of an array (U, ...) by index (N,), some of them several times.

    parts   places 0..N-1, cut so that no part takes a row twice: the gradients of copies are added part by
            part, always in that order
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), copies = grads, ctx.copies
        out = grad.new_zeros(ctx.shape)
        for part in copies.parts:
            out.index_add_(0, copies.index[part], grad.index_select(0, part))
        return out, None


@dataclass(frozen=True, slots=True)
class Shared:
    """A batch with its common prefixes taken once.

    tokens, positions   (U,)   what is forwarded
    row                 (T,)   where each token of the batch is among them; undefined for a sequence's last
                        loss token, which predicts nothing and is left out
    rank                (T,)   how many sequences before it share the token
    whole               the tokens of all sequences, copied from the U
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
        out = ops.attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen)
        return out.index_select(0, self.first)

    def hidden(self, model: Attending, rows: Tensor) -> Tensor:
        """Hidden states of the batch's tokens `rows`, (N, D)."""
        hidden = model(self.tokens, None, positions=self.positions, attend=self.attend)
        return Copies.of(self.row[rows], self.rank[rows]).take(hidden)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tokens of a packed batch are.

    sequence, position  (T,)  the token's sequence, and its place in it
    prefix              (T,)  bool: before its sequence's first loss token
    starts, lengths     (S,)
    """

    sequence: Tensor
    position: Tensor
    prefix: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Places:
        ends, T = batch.cu_seqlens.long(), batch.tokens.numel()
        starts, lengths = ends[:-1], ends.diff()
        numbers = torch.arange(len(batch), device=ends.device)
        sequence = torch.repeat_interleave(numbers, lengths, output_size=T)
        position = torch.arange(T, device=ends.device) - starts[sequence]
        loss_tokens = torch.cat([ends.new_zeros(1), batch.mask.cumsum(0)])  # before each place
        prefix = loss_tokens[1:] == loss_tokens[starts][sequence]
        return cls(sequence, position, prefix, starts, lengths)

    def count(self, chosen: Tensor) -> Tensor:
        """(S,) int64: how many tokens of each sequence are chosen (T,)."""
        return torch.zeros_like(self.starts).index_add_(0, self.sequence, chosen.long())


def shared(batch: Batch) -> Shared | None:
    """The prefixes that neighbouring sequences have in common, taken once; None when they are too short.

    Only whole prefixes of the same length, all tokens before the first loss token, are compared: those of one
    prompt.  Waits for the device.
    """
    T, numbers = batch.tokens.numel(), torch.arange(len(batch), device=batch.tokens.device)
    places = _Places.of(batch)
    prompt = places.count(places.prefix)
    alike = _like_left_neighbour(batch, places, prompt) & (numbers > 0)
    if LEAST * int(prompt[alike].sum()) <= T:
        return None

    # a run of sequences with the same prefix is led by its first
    leader = torch.where(alike, 0, numbers).cummax(0).values
    rank = torch.where(places.prefix, places.sequence - leader[places.sequence], 0)
    last = (places.position == places.lengths[places.sequence] - 1) & ~places.prefix

    kept = (rank == 0) & ~last
    number = kept.cumsum(0) - 1
    led_by = places.starts[leader[places.sequence]]
    row = torch.where(places.prefix, number[led_by + places.position], number)

    stays = (~last).nonzero().squeeze(1)
    lengths = places.lengths - places.count(last)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Shared(
        tokens=batch.tokens[kept],
        positions=places.position[kept],
        row=row,
        rank=rank,
        whole=Copies.of(row[stays], rank[stays]),
        first=kept[stays].nonzero().squeeze(1),
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=int(ends.diff().max()),
    )


def _like_left_neighbour(batch: Batch, places: _Places, prompt: Tensor) -> Tensor:
    """(S,) bool: the sequence's prefix, of `prompt` tokens, is that of the sequence on its left."""
    back = places.starts - torch.roll(places.starts, 1)  # from a sequence to its neighbour on the left
    here = torch.arange(batch.tokens.numel(), device=back.device)
    neighbour = (here - back[places.sequence]).clamp(0, here.numel() - 1)
    differs = places.count((batch.tokens != batch.tokens[neighbour]) & places.prefix)
    return (differs == 0) & (prompt == torch.roll(prompt, 1))
