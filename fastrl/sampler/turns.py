"""Conversations with an environment: what it is shown when the policy ends its turn, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastrl.errors import UserError
from fastrl.kernels.advance import LENGTH, RUNNING, STOP
from fastrl.sampler.engine import Engine
from fastrl.sampler.enter import give
from fastrl.sampler.prefill import Span, fill


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence whose policy has just ended its turn.

    index    the sequence's place in the call
    tokens   its tokens after the prompt, earlier turns and observations included
    chosen   which of them the policy chose
    """

    index: int
    tokens: list[int]
    chosen: list[bool]


Environment = Callable[[Sequence[Turn]], Sequence[Sequence[int] | None]]
"""Observation tokens for each turn, after which the policy goes on; None or nothing where the sequence is
done.
"""


class Conversation:
    """Called at every boundary of windows: asks the environment about turns that have ended, and lets
    sequences go on.
    """

    def __init__(self, engine: Engine, environment: Environment, prompt_lengths: Sequence[int]) -> None:
        self.engine, self.environment, self.prompt_lengths = engine, environment, prompt_lengths
        self.done: set[int] = set()

    def __call__(self) -> None:
        """Waits for the device: what the policy said has to be read."""
        engine = self.engine
        state, n = engine.state, engine.n
        seq = state.rows.seq[:n]
        stopped = (~state.rows.alive[:n]) & (state.records.finish[seq] == STOP)
        ended = [
            (i, s)
            for i, s, e in zip(range(n), seq.tolist(), stopped.tolist(), strict=True)
            if e and s not in self.done
        ]
        if not ended:
            return
        turns = [self._turn(s) for _, s in ended]
        said = self.environment(turns)
        if len(said) != len(turns):
            raise UserError(
                f"environment: expected one observation (or None) for each of {len(turns)} turns, "
                f"got {len(said)}"
            )
        on = []
        for (row, s), turn, observation in zip(ended, turns, said, strict=True):
            length = self.prompt_lengths[s] + len(turn.tokens)
            if observation and self._room(row, length + len(observation)):
                on.append((row, s, length, list(observation)))
            else:
                self.done.add(s)
                if observation:  # the conversation is cut, not over
                    state.records.finish[s] = LENGTH
        if on:
            self._go_on(on)

    def _turn(self, s: int) -> Turn:
        records, first = self.engine.state.records, self.prompt_lengths[s]
        last = int(records.length[s])
        return Turn(s, records.tokens[s, first:last].tolist(), records.chosen[s, first:last].tolist())

    def _room(self, row: int, length: int) -> bool:
        """Whether a row may become so long, and then draw at least one token."""
        rows = self.engine.state.rows
        return length < int(rows.until[row]) and int(rows.drawn[row]) < int(rows.budget[row])

    def _go_on(self, on: Sequence[tuple[int, int, int, list[int]]]) -> None:
        """Append the observations: tokens, pages, keys and values, and the rows' state."""
        engine, page = self.engine, self.engine.page
        rows, records = engine.state.rows, engine.state.records
        spans: list[Span] = []
        for row, s, length, observation in on:
            new = torch.tensor(observation, device=rows.length.device)
            end = length + len(observation)
            records.tokens[s, length:end] = new
            rows.length[row], rows.last[row], records.length[s], records.finish[s] = (
                end,
                new[-1],
                end,
                RUNNING,
            )
            spans.append(Span(row, records.tokens[s], length - 1, end - 1))
        # a row that ends is given no page for its newest token
        held = [(length - 2) // page + 1 for _, _, length, _ in on]
        more = [s.end // page + 1 - h for s, h in zip(spans, held, strict=True)]
        give(engine.cache, rows.table, [row for row, *_ in on], held, more)
        if engine.model.supports_cache:
            fill(engine.model, engine.cache, rows.table, spans, engine.prefill_tokens)
        rows.alive[torch.tensor([row for row, *_ in on], device=rows.alive.device)] = True
