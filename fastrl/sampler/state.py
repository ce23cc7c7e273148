"""What the engine knows, as tensors on the device: rows being decoded, records of whole sequences, and the
numbers of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels.advance import Records, Rows, need
from fastrl.sampler.cache import PagedCache

CANCELLED, UNFINISHED = 3, 4  # values of Records.finish beside those of ops.advance
REASONS = ("running", "stop", "length", "cancelled", "unfinished")
STOPS = 16  # stop tokens there is room for before the buffer is made anew


def empty_rows(B: int, N: int, nobody: int, device: torch.device) -> Rows:
    """B rows that decode nothing: one token long, of the sequence `nobody`, on page 0."""
    zeros = torch.zeros(B, dtype=torch.int64, device=device)
    dead, table = zeros.bool(), torch.zeros(B, N, dtype=torch.int32, device=device)
    return Rows(
        zeros + nobody, zeros + 1, zeros.clone(), zeros.clone(), zeros + 1, zeros.clone(), dead, table
    )


def empty_records(S: int, C: int, device: torch.device) -> Records:
    """Records of S sequences of up to C tokens, and of nobody's."""
    shape = (S + 1, C)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    logp, behaviour, entropy = (torch.zeros(shape, device=device) for _ in range(3))
    chosen, version = tokens.bool(), tokens.int()
    length = torch.zeros(S + 1, dtype=torch.int64, device=device)
    return Records(tokens, logp, behaviour, entropy, chosen, version, length, length.to(torch.int8))


@dataclass(frozen=True, slots=True)
class Look:
    """What the host sees of the device: rows alive, pages that no live row can come to need, pages in use,
    tokens drawn.
    """

    alive: int
    room: int
    used: int
    total: int


class State:
    """Buffers that keep their place for as long as they are large enough, so that captured graphs stay valid.

    rows      `Rows` of B rows, the live ones first
    records   `Records` of S sequences and of nobody's, whose number is S
    key       (S+1,) int64, each sequence's number in the noise
    seed, temperature, version, total, stops   of the call, on the device
    """

    def __init__(
        self, cache: PagedCache, B: int, S: int, C: int, device: torch.device, stops: int = 0
    ) -> None:
        self.cache, self.B, self.S, self.C, self.device = cache, B, S, C, device
        self.records = empty_records(S, C, device)
        self.rows = empty_rows(B, -(-C // cache.page), S, device)
        self.key = torch.zeros(S + 1, dtype=torch.int64, device=device)
        self.seed, self.version, self.total = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.temperature = torch.ones(
            1, dtype=torch.float64 if cache.k.dtype == torch.float64 else torch.float32, device=device
        )
        self.stops = torch.full((max(STOPS, stops),), -1, dtype=torch.int64, device=device)
        self.index = torch.arange(B, device=device)

    def fits(self, S: int, C: int, stops: int) -> bool:
        """Whether there is room for S sequences of C tokens and so many stop tokens."""
        return S <= self.S and C <= self.C and stops <= self.stops.numel()

    def begin(self, seed: int, temperature: float, stops: Sequence[int], version: int) -> None:
        """Start a call: no rows, no sequences."""
        for x, empty in zip(
            self.rows, empty_rows(self.B, self.rows.table.shape[1], self.S, self.device), strict=True
        ):
            x.copy_(empty)
        self.stops.fill_(-1)
        self.stops[: len(stops)] = torch.tensor(stops, dtype=torch.int64)
        for x, value in (
            (self.seed, seed),
            (self.temperature, temperature),
            (self.version, version),
            (self.total, 0),
        ):
            x.fill_(value)

    def look(self, b: int) -> Tensor:
        """The numbers of a `Look` at the first b rows, (4,) int64."""
        rows, page, pages = self.rows, self.cache.page, self.cache.pages
        alive, more = need(rows.alive[:b], rows.length[:b], rows.until[:b], page)
        return torch.stack([alive, pages.top[0] - more, self.cache.capacity - pages.top[0], self.total[0]])

    def compact(self, b: int) -> None:
        """Bring the live ones among the first b rows to the front, in order; give the others' pages back and
        empty them.
        """
        rows = Rows(*(x[:b] for x in self.rows))
        alive = rows.alive.clone()
        self.cache.release(torch.where(alive[:, None], 0, rows.table))
        order = (~alive).to(torch.int8).argsort(stable=True)
        kept = alive[order]
        for x, empty in zip(rows, empty_rows(b, rows.table.shape[1], self.S, self.device), strict=True):
            x.copy_(torch.where(kept if x.ndim == 1 else kept[:, None], x[order], empty))

    def end(self, b: int, which: Tensor, reason: int) -> None:
        """End those of the first b rows that are alive and in `which` (b,) bool, for this reason."""
        rows = self.rows
        hit = which & rows.alive[:b]
        seq = torch.where(hit, rows.seq[:b], self.S)
        self.records.finish.index_fill_(0, seq, reason)
        rows.alive[:b].logical_and_(~hit)


def pages_of(until: Any, page: int) -> Any:
    """Pages a sequence takes that may become `until` tokens long; its last token never has a key."""
    return (until - 2) // page + 1
