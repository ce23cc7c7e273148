"""Episodes of several turns: what an environment is shown when the policy ends its turn, and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.batch.transfer import fetch, send
from fastrl.errors import UserError
from fastrl.kernels._rows import put_rows
from fastrl.kernels.advance import LENGTH, RUNNING, STOP
from fastrl.model.language import has_cache
from fastrl.sampler.admit import allocate, cells
from fastrl.sampler.engine import Engine
from fastrl.sampler.prefill import Span, numbers, packs, prefill
from fastrl.sampler.state import State


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence in which the policy has just ended its turn.

    index    the sequence's place in the call
    tokens   its tokens after the prompt, earlier turns and observations included
    chosen   which of them the policy chose
    """

    index: int
    tokens: list[int]
    chosen: list[bool]


Environment = Callable[[Sequence[Turn]], Sequence[Sequence[int] | None]]
"""Observation tokens for each turn, after which the policy goes on; None or nothing where the episode is
over.
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A row whose turn has ended: what the host read of it."""

    row: int
    seq: int
    length: int
    until: int
    drawn: int
    budget: int

    def has_room(self, length: int) -> bool:
        """Whether the row may become this long, and then draw at least one token."""
        return length < self.until and self.drawn < self.budget


@dataclass(frozen=True, slots=True)
class Reply:
    """An observation to append to a row: `length` tokens of sequence `seq` are there already."""

    row: int
    seq: int
    length: int
    observation: list[int]

    @property
    def end(self) -> int:
        """Tokens with it."""
        return self.length + len(self.observation)


class TurnHandler:
    """Called before every window: asks the environment about turns that have ended, and lets sequences go
    on.
    """

    def __init__(self, engine: Engine, environment: Environment, prompt_lengths: Sequence[int]) -> None:
        self.engine, self.environment, self.prompt_lengths = engine, environment, prompt_lengths
        self.done: set[int] = set()

    def __call__(self) -> None:
        """Answer the turns that have ended.  Waits for the device, whose tokens it reads."""
        ended = self._ended()
        if not ended:
            return

        turns = self._turns(ended)
        observations = self.environment(turns)
        if len(observations) != len(turns):
            raise UserError(
                f"environment: expected one observation (or None) for each of {len(turns)} turns, "
                f"got {len(observations)}"
            )

        replies, cut = [], []
        for one, observation in zip(ended, observations, strict=True):
            if observation and one.has_room(one.length + len(observation)):
                replies.append(Reply(one.row, one.seq, one.length, list(observation)))
                continue
            self.done.add(one.seq)
            if observation:  # the episode is cut, not over
                cut.append(one.seq)
        if replies or cut:
            self._append(replies, cut)

    def _ended(self) -> list[Ended]:
        """Every row whose turn has ended and was not answered yet."""
        state, n = self.engine.state, self.engine.n
        rows, records = state.rows, state.records
        seq = rows.seq[:n]
        stopped = (~rows.alive[:n]) & (records.finish[seq] == STOP)
        numbers = (seq, records.length[seq], rows.until[:n], rows.drawn[:n], rows.budget[:n])
        *read, ended = (x.tolist() for x in fetch([*numbers, stopped]))
        found = [Ended(row, *one) for row, one in enumerate(zip(*read, strict=True))]
        return [one for one in found if ended[one.row] and one.seq not in self.done]

    def _turns(self, ended: Sequence[Ended]) -> list[Turn]:
        """The turns' tokens, read together."""
        records, width = self.engine.state.records, self.engine.state.C
        first = [self.prompt_lengths[one.seq] for one in ended]
        parts = [
            torch.arange(one.seq * width + start, one.seq * width + one.length)
            for one, start in zip(ended, first, strict=True)
        ]
        (places,) = send([torch.cat(parts)], records.tokens.device)
        columns = (records.tokens, records.chosen)
        tokens, chosen = fetch([x.view(-1).index_select(0, places) for x in columns])

        sizes = [len(part) for part in parts]
        each = zip(ended, tokens.split(sizes), chosen.split(sizes), strict=True)
        return [Turn(one.seq, mine.tolist(), picked.tolist()) for one, mine, picked in each]

    def _append(self, replies: Sequence[Reply], cut: Sequence[int]) -> None:
        """Append the observations: tokens, pages, keys and values, and the rows' state; end the sequences
        `cut`.
        """
        engine, page = self.engine, self.engine.page
        state, cache = engine.state, engine.cache
        spans = [Span(r.row, r.seq, r.length - 1, r.end - 1) for r in replies]
        packed = packs(spans, engine.prefill_tokens) if has_cache(engine.model) else []

        # a row that ends was given no page for its newest token
        held = [(reply.length - 2) // page + 1 for reply in replies]
        more = [span.end // page + 1 - pages for span, pages in zip(spans, held, strict=True)]
        pages = cells([reply.row for reply in replies], held, more)

        host = [torch.tensor(list(cut), dtype=torch.int64), pages, *_written(replies, state.C)]
        sent = send([*host, *map(numbers, packed)], state.device)
        ended, pages, places, tokens, of_rows, *of_packs = sent
        state.records.finish.index_fill_(0, ended, LENGTH)
        _write(state, places, tokens, of_rows)
        allocate(cache, state.rows.table, pages)
        if has_cache(engine.model):
            table, records = state.rows.table, state.records
            prefill(engine.model, cache, table, records.tokens, packed, of_packs)
        state.rows.alive.index_fill_(0, of_rows[0], True)


def _written(replies: Sequence[Reply], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the observations' tokens go among the records' (rows of `width`); the tokens; and (4, R) row,
    sequence, new length and newest token of each reply.
    """
    places = [torch.arange(r.seq * width + r.length, r.seq * width + r.end) for r in replies]
    tokens = [token for r in replies for token in r.observation]
    of_rows = [(r.row, r.seq, r.end, r.observation[-1]) for r in replies]
    empty = torch.empty(0, dtype=torch.int64)
    return (
        torch.cat([*places, empty]),
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(of_rows, dtype=torch.int64).view(-1, 4).T.contiguous(),
    )


def _write(state: State, places: Tensor, tokens: Tensor, of_rows: Tensor) -> None:
    """Write observations into the records, and into their rows."""
    rows, records = state.rows, state.records
    row, seq, end, newest = of_rows
    put_rows(records.tokens.view(-1), places, tokens)
    put_rows(records.length, seq, end)
    records.finish.index_fill_(0, seq, RUNNING)
    put_rows(rows.length, row, end)
    put_rows(rows.last, row, newest)
