"""Episodes of several turns: what an environment is shown when the policy ends its turn, and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastrl.errors import UserError
from fastrl.kernels.advance import LENGTH, RUNNING, STOP
from fastrl.model.language import has_cache
from fastrl.sampler.admit import allocate
from fastrl.sampler.engine import Engine
from fastrl.sampler.prefill import Span, prefill


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
class Reply:
    """An observation to append to a row: `length` tokens of sequence `seq` are there already."""

    row: int
    seq: int
    length: int
    observation: list[int]


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

        turns = [self._turn(seq) for _, seq in ended]
        observations = self.environment(turns)
        if len(observations) != len(turns):
            raise UserError(
                f"environment: expected one observation (or None) for each of {len(turns)} turns, "
                f"got {len(observations)}"
            )

        replies = []
        for (row, seq), turn, observation in zip(ended, turns, observations, strict=True):
            length = self.prompt_lengths[seq] + len(turn.tokens)
            if observation and self._has_room(row, length + len(observation)):
                replies.append(Reply(row, seq, length, list(observation)))
                continue
            self.done.add(seq)
            if observation:  # the episode is cut, not over
                self.engine.state.records.finish[seq] = LENGTH
        if replies:
            self._append(replies)

    def _ended(self) -> list[tuple[int, int]]:
        """(row, sequence) of every turn that has ended and was not answered yet."""
        state, n = self.engine.state, self.engine.n
        seq = state.rows.seq[:n]
        stopped = (~state.rows.alive[:n]) & (state.records.finish[seq] == STOP)
        pairs = enumerate(zip(seq.tolist(), stopped.tolist(), strict=True))
        return [(row, s) for row, (s, ended) in pairs if ended and s not in self.done]

    def _turn(self, seq: int) -> Turn:
        records, first = self.engine.state.records, self.prompt_lengths[seq]
        end = int(records.length[seq])
        tokens, chosen = records.tokens[seq, first:end], records.chosen[seq, first:end]
        return Turn(seq, tokens.tolist(), chosen.tolist())

    def _has_room(self, row: int, length: int) -> bool:
        """Whether a row may become this long, and then draw at least one token."""
        rows = self.engine.state.rows
        return length < int(rows.until[row]) and int(rows.drawn[row]) < int(rows.budget[row])

    def _append(self, replies: Sequence[Reply]) -> None:
        """Append the observations: tokens, pages, keys and values, and the rows' state."""
        engine, page = self.engine, self.engine.page
        rows = engine.state.rows
        spans = [self._write(reply) for reply in replies]

        # a row that ends was given no page for its newest token
        held = [(reply.length - 2) // page + 1 for reply in replies]
        more = [span.end // page + 1 - pages for span, pages in zip(spans, held, strict=True)]
        allocate(engine.cache, rows.table, [reply.row for reply in replies], held, more)

        if has_cache(engine.model):
            prefill(engine.model, engine.cache, rows.table, spans, engine.prefill_tokens)
        rows.alive[torch.tensor([reply.row for reply in replies], device=rows.alive.device)] = True

    def _write(self, reply: Reply) -> Span:
        """Write an observation into the records and its row; the tokens that the cache then lacks."""
        rows, records = self.engine.state.rows, self.engine.state.records
        row, seq = reply.row, reply.seq
        new = torch.tensor(reply.observation, device=rows.length.device)
        end = reply.length + len(reply.observation)
        records.tokens[seq, reply.length : end] = new
        records.length[seq], records.finish[seq] = end, RUNNING
        rows.length[row], rows.last[row] = end, new[-1]
        return Span(row, records.tokens[seq], reply.length - 1, end - 1)
