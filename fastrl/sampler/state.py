"""What the engine knows, as tensors on the device: rows being decoded, records of whole sequences, and the
numbers of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.batch.transfer import send
from fastrl.kernels.advance import Records, Rows, need
from fastrl.sampler.cache import PagedCache

CANCELLED, UNFINISHED = 3, 4  # values of Records.finish beside those of ops.advance
REASONS = ("running", "stop", "length", "cancelled", "unfinished")
STOPS = 16  # stop tokens that the buffer holds before it is made anew


def empty_rows(B: int, N: int, pad_row: int, device: torch.device) -> Rows:
    """B rows that decode nothing: one token long, with the record `pad_row`, on page 0."""
    zeros = torch.zeros(B, dtype=torch.int64, device=device)
    table = torch.zeros(B, N, dtype=torch.int32, device=device)
    return Rows(
        seq=zeros + pad_row,
        length=zeros + 1,
        drawn=zeros.clone(),
        budget=zeros.clone(),
        until=zeros + 1,
        last=zeros.clone(),
        alive=zeros.bool(),
        table=table,
    )


def empty_records(S: int, C: int, device: torch.device) -> Records:
    """Records of S sequences of up to C tokens, plus one padding row."""
    shape = (S + 1, C)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    logp, behaviour_logp, entropy = (torch.zeros(shape, device=device) for _ in range(3))
    length = torch.zeros(S + 1, dtype=torch.int64, device=device)
    return Records(
        tokens=tokens,
        logp=logp,
        behaviour_logp=behaviour_logp,
        entropy=entropy,
        chosen=tokens.bool(),
        version=tokens.int(),
        length=length,
        finish=length.to(torch.int8),
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A host snapshot of device counters: live rows, pages free to admit, pages in use, tokens drawn.

    A page is free to admit when no live row can come to need it.
    """

    live: int
    free_pages: int
    used_pages: int
    drawn: int


class State:
    """Buffers that keep their place for as long as they are large enough, so that captured graphs stay valid.

    rows      `Rows` of B rows, the live ones first
    records   `Records` of S sequences, and of the padding row S
    key       (S+1,) int64, each sequence's number in the noise
    seed, temperature   (B,) of the call, the same for every row
    version, total, stops   of the call, on the device
    """

    def __init__(
        self, cache: PagedCache, B: int, S: int, C: int, device: torch.device, stops: int = 0
    ) -> None:
        self.cache, self.B, self.S, self.C, self.device = cache, B, S, C, device
        self.records = empty_records(S, C, device)
        self.rows = empty_rows(B, -(-C // cache.page), S, device)
        self.key = torch.zeros(S + 1, dtype=torch.int64, device=device)

        self.version, self.total = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        # one number for each row, so that a step copies none
        self.seed = torch.zeros(B, dtype=torch.int64, device=device)
        wide = torch.float64 if cache.k.dtype == torch.float64 else torch.float32
        self.temperature = torch.ones(B, dtype=wide, device=device)
        self.stops = torch.full((max(STOPS, stops),), -1, dtype=torch.int64, device=device)

    def fits(self, S: int, C: int, stops: int) -> bool:
        """Whether there is room for S sequences of C tokens and this number of stop tokens."""
        return S <= self.S and C <= self.C and stops <= self.stops.numel()

    def begin(self, seed: int, temperature: float, stops: Sequence[int], version: int) -> None:
        """Start a call: no rows, no sequences."""
        empty = empty_rows(self.B, self.rows.table.shape[1], self.S, self.device)
        for column, value in zip(self.rows, empty, strict=True):
            column.copy_(value)
        self.stops.fill_(-1)
        (given,) = send([torch.tensor(stops, dtype=torch.int64)], self.device)
        self.stops[: len(stops)] = given
        self.seed.fill_(seed)
        self.temperature.fill_(temperature)
        self.version.fill_(version)
        self.total.fill_(0)

    def look(self, b: int) -> Tensor:
        """The numbers of a `Snapshot` of the first b rows, (4,) int64, on the device."""
        rows, pages = self.rows, self.cache.pages
        live, needed = need(rows.alive[:b], rows.length[:b], rows.until[:b], self.cache.page)
        free = pages.top[0]
        return torch.stack([live, free - needed, self.cache.capacity - free, self.total[0]])

    def compact(self, b: int) -> None:
        """Move the live ones among the first b rows to the front, in order; free the others' pages and empty
        them.
        """
        rows = Rows(*(column[:b] for column in self.rows))
        alive = rows.alive.clone()
        self.cache.release(torch.where(alive[:, None], 0, rows.table))

        order = (~alive).to(torch.int8).argsort(stable=True)
        kept = alive[order]
        empty = empty_rows(b, rows.table.shape[1], self.S, self.device)
        for column, blank in zip(rows, empty, strict=True):
            keeps = kept if column.ndim == 1 else kept[:, None]
            column.copy_(torch.where(keeps, column[order], blank))

    def end(self, b: int, which: Tensor, reason: int) -> None:
        """End those of the first b rows that are alive and in `which` (b,) bool, for this reason."""
        ends = which & self.rows.alive[:b]
        seq = torch.where(ends, self.rows.seq[:b], self.S)
        self.records.finish.index_fill_(0, seq, reason)
        self.rows.alive[:b].logical_and_(~ends)


def pages_of(max_length: int, page: int) -> int:
    """Pages of a sequence that may become `max_length` tokens long; its last token never has a key."""
    return (max_length - 2) // page + 1
