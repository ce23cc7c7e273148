"""Common prefixes: sequences that begin alike, as the G completions of one prompt do, forward it once.

Norms, projections and MLP run on the U distinct tokens.  Only attention sees every sequence whole: its
queries, keys and values are copied from the distinct tokens, and its outputs are kept once.  With prompts of
N tokens and completions of M that saves (G - 1) N of the G (N + M) tokens in every matrix product, forward
and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrl import ops
from fastrl.batch.copies import Copies, place
from fastrl.kernels._rows import take_rows

MAX_TOKENS_PER_SPARED = 16  # copying queries, keys and values pays once one token in so many is spared

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> its output


class Attending(Protocol):
    """A model that leaves attention to the caller (`Decoder`)."""

    def __call__(self, tokens: Tensor, cu_seqlens: None, *, positions: Tensor, attend: Attend) -> Tensor: ...


class Sequences(Protocol):
    """What is read of a batch, on the host."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """A batch with its common prefixes taken once, on the device of the model that forwards it.

    tokens, positions   (U,)   what is forwarded
    whole               the tokens of all sequences, copied from the U
    first               (U,)   the place of each of the U in `whole`
    live                the tokens whose hidden states are asked for, among the U
    cu_seqlens          (S+1,) int32, ends of the sequences in `whole`, of at most max_seqlen tokens
    """

    tokens: Tensor
    positions: Tensor
    whole: Copies
    first: Tensor
    live: Copies
    cu_seqlens: Tensor
    max_seqlen: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the U tokens, for `Decoder.forward`."""
        q = self.whole.take(q)
        k = self.whole.take(k)
        v = self.whole.take(v)
        out = ops.attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen)
        return take_rows(out, self.first)

    def hidden(self, model: Attending) -> Tensor:
        """Hidden states of the tokens that were asked for, (N, D)."""
        return self.live.take(model(self.tokens, None, positions=self.positions, attend=self.attend))


@dataclass(frozen=True, slots=True)
class Shared:
    """The same, on the host.

    row        (T,)   where each token of the batch is among the U; undefined for a sequence's last loss
               token, which predicts nothing and is left out
    rank       (T,)   how many sequences before it share the token
    """

    tokens: Tensor
    positions: Tensor
    row: Tensor
    rank: Tensor
    whole: Copies
    first: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def place(self, rows: Tensor, device: torch.device) -> tuple[Prefix, Tensor]:
        """The batch on `device`, its tokens `rows` (N,) asked for; and `rows` there.  Waits for nothing."""
        live = Copies.of(self.row[rows], self.rank[rows])
        others = (self.tokens, self.positions, self.first, self.cu_seqlens, rows)
        (whole, asked), sent = place((self.whole, live), self.tokens.numel(), others, device)
        tokens, positions, first, ends, rows = sent
        return Prefix(tokens, positions, whole, first, asked, ends, self.max_seqlen), rows


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
    def of(cls, batch: Sequences) -> _Places:
        T = batch.tokens.numel()
        ends = batch.cu_seqlens.long()
        starts, lengths = ends[:-1], ends.diff()

        numbers = torch.arange(len(batch), device=ends.device)
        sequence = torch.repeat_interleave(numbers, lengths, output_size=T)
        here = torch.arange(T, device=ends.device)
        position = here - starts[sequence]

        counted = batch.mask.cumsum(0)
        before = torch.cat([ends.new_zeros(1), counted])  # loss tokens before each place
        at_start = before[starts]
        prefix = counted == at_start[sequence]
        return cls(sequence, position, prefix, starts, lengths)

    def count(self, chosen: Tensor) -> Tensor:
        """(S,) int64: how many tokens of each sequence are chosen (T,)."""
        return torch.zeros_like(self.starts).index_add_(0, self.sequence, chosen.long())


def shared(batch: Sequences) -> Shared | None:
    """The prefixes that neighbouring sequences have in common, taken once; None when they are too short.

    Only whole prefixes of the same length, all tokens before the first loss token, are compared: those of one
    prompt.  The batch is read on the host (see `Batch.known`).
    """
    places = _Places.of(batch)
    sequence, position, prefix = places.sequence, places.position, places.prefix
    numbers = torch.arange(len(batch), device=batch.tokens.device)

    prompt = places.count(prefix)
    alike = _like_left_neighbour(batch, places, prompt) & (numbers > 0)
    spared = int(prompt[alike].sum())
    if MAX_TOKENS_PER_SPARED * spared <= batch.tokens.numel():
        return None

    # a run of sequences with the same prefix is led by its first
    leader = torch.where(alike, 0, numbers).cummax(0).values
    leader_of = leader[sequence]
    rank = torch.where(prefix, sequence - leader_of, 0)
    at_end = position == places.lengths[sequence] - 1
    last = at_end & ~prefix

    kept = (rank == 0) & ~last
    number = kept.cumsum(0) - 1
    in_leader = places.starts[leader_of] + position
    row = torch.where(prefix, number[in_leader], number)

    stays = (~last).nonzero().squeeze(1)
    whole = Copies.of(row[stays], rank[stays])
    first = kept[stays].nonzero().squeeze(1)
    lengths = places.lengths - places.count(last)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    longest = int(lengths.max())
    return Shared(
        tokens=batch.tokens[kept],
        positions=position[kept],
        row=row,
        rank=rank,
        whole=whole,
        first=first,
        cu_seqlens=ends.to(torch.int32),
        max_seqlen=longest,
    )


def _like_left_neighbour(batch: Sequences, places: _Places, prompt: Tensor) -> Tensor:
    """(S,) bool: the sequence's prefix, of `prompt` tokens, is that of the sequence on its left."""
    back = places.starts - torch.roll(places.starts, 1)  # from a sequence to its neighbour on the left
    T = batch.tokens.numel()
    here = torch.arange(T, device=back.device)
    same_place = here - back[places.sequence]
    neighbour = batch.tokens[same_place.clamp(0, T - 1)]

    other = (batch.tokens != neighbour) & places.prefix
    differs = places.count(other)
    same_length = prompt == torch.roll(prompt, 1)
    return (differs == 0) & same_length
