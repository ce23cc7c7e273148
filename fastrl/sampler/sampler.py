"""The sampler: prompts in, packed `Rollouts` out, with the current weights of the model being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from fastrl.batch.types import Rollouts
from fastrl.config import Sampling
from fastrl.errors import UserError
from fastrl.kernels.advance import LENGTH
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.engine import PAGE, Engine
from fastrl.sampler.params import SamplingParams, Tail
from fastrl.sampler.prompts import Prompt, check_room, stop_tokens, tokenize
from fastrl.sampler.queue import Group, Waiting
from fastrl.sampler.state import REASONS, UNFINISHED, State, pages_of
from fastrl.sampler.turns import Conversation, Environment

ENDS = {"cut": LENGTH, "carry": UNFINISHED}  # what Tail.action makes of a sequence


@dataclass(frozen=True, slots=True)
class Job:
    """A sequence to make.

    prompt, index   its prompt, and which one of the call that is
    length, drawn   tokens that it has, and how many of them were drawn
    budget          tokens that may be drawn
    number          the key of its randomness
    origin          sequences of one origin and prompt share the prompt's pages
    """

    prompt: list[int]
    index: int
    length: int
    drawn: int
    budget: int
    number: int
    origin: tuple[str, int]


class Sampler:
    """Generates with `model`'s current weights; nothing is copied, so an optimizer step is seen by the next
    call.

    max_tokens_in_flight   key/value cache budget, tokens; sequences that do not fit wait
    cache_bytes            the same in bytes, instead
    keep_cache             False gives the cache's memory back after every call (and captures graphs anew in
                           the next)
    max_rows               sequences decoded together; None takes 256 on CPU, 1024 on CUDA
    prefill_tokens         tokens of one prefill; longer prompts are cut; None takes 4096 on CPU, 16384 on
                           CUDA
    timing                 seconds of the last call by phase: prefill, decode, sample (part of decode on
                           CUDA), schedule
    peak_pages             cache pages, of 64 tokens, that the last call had in use at once
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_tokens_in_flight: int = 262144,
        cache_bytes: int = 0,
        keep_cache: bool = True,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.keep_cache, self.max_rows, self.prefill_tokens = (
            model,
            tokenizer,
            keep_cache,
            max_rows,
            prefill_tokens,
        )
        self.max_tokens_in_flight = (
            cache_bytes // PagedCache.token_bytes(model) if cache_bytes else max_tokens_in_flight
        )
        self._engine: Engine | None = None

    @classmethod
    def configured(cls, model: Any, tokenizer: Any, sampling: Sampling) -> Sampler:
        """A sampler with the budget that the options --sampling.* give it."""
        return cls(
            model,
            tokenizer,
            max_tokens_in_flight=sampling.max_tokens_in_flight,
            cache_bytes=sampling.cache_bytes,
            keep_cache=sampling.keep_cache,
            max_rows=sampling.max_rows,
        )

    @property
    def timing(self) -> dict[str, float]:
        """Seconds of the last call by phase; what is missing to its whole time the host spent elsewhere."""
        return dict(self._engine.timing) if self._engine else {}

    @property
    def peak_pages(self) -> int:
        """Pages of the cache that the last call had in use at once, as far as the host looked."""
        return self._engine.peak_pages if self._engine else 0

    def release(self) -> None:
        """Give the cache's memory back until the next call."""
        if self._engine:
            self._engine.release()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        sequence_offset: int = 0,
        weight_version: int = 0,
        on_tokens: Callable[[int], None] | None = None,
        environment: Environment | None = None,
        tail: Tail | None = None,
        carried: Rollouts | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Rollouts:
        """`params.n` completions of every prompt; sequence i answers prompt i // n.

        sequence_offset   number of the first sequence, the second part of the randomness key
        weight_version    recorded with every token drawn
        on_tokens(n)      is told of every n tokens drawn
        environment       answers each turn that the policy ends with a stop; its tokens are no part of
                          completion_mask
        tail              what becomes of the last few sequences; None finishes them
        carried           unfinished sequences of earlier calls, which go on under their own numbers; they
                          come first in what is returned; one with nothing left to draw under these params
                          ends as "length"
        lengths           the longest completion of each prompt, instead of params.max_new_tokens

        Raises UserError for a prompt that is empty, foreign to the vocabulary or too long for the context,
        and for a budget that does not hold one sequence.
        """
        if lengths is not None and (len(lengths) != len(prompts) or min(lengths, default=1) < 1):
            raise UserError(
                f"lengths: expected {len(prompts)} positive numbers, one for each prompt, got {list(lengths)}"
            )
        jobs = [*_carried(carried, params), *self._new(prompts, params, sequence_offset, lengths)]
        if not jobs:
            return self._collect(State(PagedCache(self.model, 0, PAGE), 0, 0, 0, self.model.device), jobs)
        limit = self._limit(params)
        until = [
            max(job.length, limit if environment else min(limit, len(job.prompt) + job.budget))
            for job in jobs
        ]
        engine = self._engine
        if engine is None or engine.model is not self.model:
            engine = self._engine = Engine(
                self.model,
                tokens=self.max_tokens_in_flight,
                max_rows=self.max_rows,
                prefill_tokens=self.prefill_tokens,
            )
        engine.tokens = self.max_tokens_in_flight
        try:
            engine.begin(
                len(jobs),
                max(until),
                sum(pages_of(u, PAGE) + 1 for u in until),
                seed=params.seed,
                temperature=params.temperature,
                filters=(params.top_k, params.top_p, params.min_p),
                version=weight_version,
                stops=stop_tokens(params.stop, self.tokenizer, self.model.config.eos_token_id),
                between=Conversation(engine, environment, [len(job.prompt) for job in jobs])
                if environment
                else None,
            )
            _write(engine.state, jobs, carried)
            _queue(engine, jobs, until)
            self._run(engine, len(jobs), on_tokens, tail)
            return self._collect(engine.state, jobs)
        finally:
            if not self.keep_cache:
                engine.release()

    def _limit(self, params: SamplingParams) -> int:
        context = self.model.config.max_position_embeddings
        return min(context, params.max_length or context)

    def _new(
        self, prompts: Sequence[Prompt], params: SamplingParams, offset: int, lengths: Sequence[int] | None
    ) -> list[Job]:
        whose = "max_length" if params.max_length else "the model's context"
        jobs = []
        for i, tokens in enumerate(tokenize(prompts, self.tokenizer, self.model.config.vocab_size)):
            check_room(len(tokens), f"prompts[{i}]", self._limit(params), whose)
            budget = params.max_new_tokens if lengths is None else lengths[i]
            jobs += [
                Job(tokens, i, len(tokens), 0, budget, offset + i * params.n + j, ("new", i))
                for j in range(params.n)
            ]
        return jobs

    def _run(
        self, engine: Engine, S: int, on_tokens: Callable[[int], None] | None, tail: Tail | None
    ) -> None:
        """Window after window, until all are done or only the tail is left."""
        told, going = 0, True
        while going:
            going = engine.window()
            if on_tokens is not None and (total := engine.drawn(wait=not going)) > told:
                on_tokens(total - told)
                told = total
            if going and tail is not None and not len(engine.queue) and engine.unfinished() <= tail.share * S:
                engine.end(ENDS[tail.action])
                going = False
        engine.finish()

    def _collect(self, state: State, jobs: Sequence[Job]) -> Rollouts:
        """What the records hold of the call's sequences, packed."""
        device, S, records = self.model.device, len(jobs), state.records
        lengths = records.length[:S]
        inside = torch.arange(state.C, device=device) < lengths[:, None]
        tokens, logp, behaviour_logp, entropy, chosen, version = (x[:S][inside] for x in records[:6])
        prompt_index, prompt_lengths, sequence = (
            torch.tensor([(j.index, len(j.prompt), j.number) for j in jobs], dtype=torch.int64, device=device)
            .view(-1, 3)
            .T
        )
        text = None
        if self.tokenizer is not None:
            rows = zip(jobs, records.tokens[:S].tolist(), lengths.tolist(), strict=True)
            ids = [row[len(job.prompt) : end] for job, row, end in rows]
            # of none it makes one empty text
            text = self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []
        return Rollouts(
            tokens=tokens,
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
            completion_mask=chosen,
            prompt_index=prompt_index.contiguous(),
            prompt_lengths=prompt_lengths.contiguous(),
            sequence=sequence.contiguous(),
            logp=logp,
            behaviour_logp=behaviour_logp,
            entropy=entropy,
            weight_version=torch.where(chosen, version.long(), -1),
            text=text,
            finish_reason=[REASONS[code] for code in records.finish[:S].tolist()],
        )


def _carried(carried: Rollouts | None, params: SamplingParams) -> list[Job]:
    """Sequences to go on with, as they were left."""
    if carried is None:
        return []
    if carried.sequence is None:
        raise UserError(
            "carried: expected rollouts of this sampler, which know their sequences' numbers, "
            "got some without"
        )
    for i, reason in enumerate(carried.finish_reason):
        if reason != REASONS[UNFINISHED]:
            raise UserError(
                f"carried: expected unfinished sequences only; sequence {i} ended with {reason!r}"
            )
    tokens, ends = carried.tokens.tolist(), carried.cu_seqlens.tolist()
    prefix = torch.cat([carried.prompt_lengths.new_zeros(1), carried.completion_mask.cumsum(0)]).tolist()
    columns = (carried.prompt_lengths.tolist(), carried.prompt_index.tolist(), carried.sequence.tolist())
    return [
        Job(
            tokens[a : a + p],
            index,
            b - a,
            prefix[b] - prefix[a],
            params.max_new_tokens,
            number,
            ("carried", index),
        )
        for a, b, p, index, number in zip(ends[:-1], ends[1:], *columns, strict=True)
    ]


def _queue(engine: Engine, jobs: Sequence[Job], until: Sequence[int]) -> None:
    """Queue the jobs, those of one prompt as a group.  One that was carried here with all it may draw or hold
    has ended already.
    """
    records = engine.state.records
    over = [i for i, job in enumerate(jobs) if job.drawn >= job.budget or job.length >= until[i]]
    if over:
        records.finish[over] = LENGTH
    waiting = [(i, jobs[i]) for i in sorted(set(range(len(jobs))).difference(over))]
    for _, same in groupby(waiting, key=lambda pair: (pair[1].origin, pair[1].prompt)):
        members = list(same)
        group = Group(records.tokens[members[0][0], : len(members[0][1].prompt)])
        engine.add([Waiting(i, group, job.length, job.drawn, job.budget, until[i]) for i, job in members])


def _write(state: State, jobs: Sequence[Job], carried: Rollouts | None) -> None:
    """The records of sequences that have not come in yet: prompts, and what the carried ones have so far."""
    records, S = state.records, len(jobs)
    for x in records:
        x[:S] = 0
    lengths = torch.tensor([job.length for job in jobs])
    state.key[:S] = torch.tensor([job.number for job in jobs])
    records.length[:S] = lengths
    inside = (torch.arange(state.C) < lengths[:, None]).to(state.device)
    new = jobs[0 if carried is None else len(carried) :]
    # each once, however many samples it has
    prompts = {id(job.prompt): torch.tensor(job.prompt, dtype=torch.int64) for job in new}
    fresh = torch.cat([prompts[id(job.prompt)] for job in new] or [torch.empty(0, dtype=torch.int64)]).to(
        state.device
    )
    records.tokens[:S][inside] = fresh if carried is None else torch.cat([carried.tokens, fresh])
    if carried is not None:
        n = len(carried)
        values = (
            carried.logp,
            carried.behaviour_logp,
            carried.entropy,
            carried.completion_mask,
            carried.weight_version.int(),
        )
        for x, value in zip(records[1:6], values, strict=True):
            x[:n][inside[:n]] = value
