"""The sampler: prompts in, packed `Rollouts` out, with the current weights of the model being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrl.batch.transfer import fetch, send
from fastrl.batch.types import Rollouts
from fastrl.config import Sampling
from fastrl.data.check import check_room
from fastrl.errors import UserError
from fastrl.kernels._backend import is_exact
from fastrl.kernels.advance import LENGTH
from fastrl.model.language import LanguageModel, Tokenizer
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.engine import PAGE, CallSettings, Engine
from fastrl.sampler.jobs import Job, carried_jobs, new_jobs, places_of, queue_jobs, write_records
from fastrl.sampler.params import SamplingParams, Tail
from fastrl.sampler.prompts import Prompt, stop_tokens, tokenize
from fastrl.sampler.state import REASONS, UNFINISHED, State, pages_of
from fastrl.sampler.turns import Environment, TurnHandler

ENDS = {"cut": LENGTH, "carry": UNFINISHED}  # Tail.action -> how it ends a sequence
Prompts = Sequence[Prompt]
Lengths = Sequence[int]
OnTokens = Callable[[int], None]


class Sampler:
    """Generates with `model`'s current weights; nothing is copied, so an optimizer step is seen by the next
    call.

    max_tokens_in_flight   key/value cache budget, tokens; sequences that do not fit wait
    cache_bytes            the same in bytes, instead
    keep_cache             False frees the cache's memory after every call (and captures graphs anew in the
                           next)
    max_rows               sequences decoded together; None takes 256 on CPU, 1024 on CUDA
    prefill_tokens         tokens of one prefill; longer prompts are cut; None takes 4096 on CPU, 16384 on
                           CUDA
    logits_dtype           of the logits that tokens are drawn from: float32 (or the model's, if wider), or
                           bfloat16 for a bfloat16 model: half the bytes, and a log-prob is off by up to 2^-8
                           of its logit
    timing                 seconds of the last call by phase: prefill, decode, sample (part of decode on
                           CUDA), schedule
    peak_pages             cache pages, of 64 tokens, that the last call had in use at once
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        max_tokens_in_flight: int = 262144,
        cache_bytes: int = 0,
        keep_cache: bool = True,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        if logits_dtype not in (torch.float32, model.dtype):
            raise UserError(
                f"logits_dtype: expected torch.float32, or the model's {model.dtype}, got {logits_dtype}; "
                "logits are never narrower than what they are computed from"
            )
        self.logits_dtype = logits_dtype
        self.model, self.tokenizer, self.keep_cache = model, tokenizer, keep_cache
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.max_tokens_in_flight = max_tokens_in_flight
        if cache_bytes:
            self.max_tokens_in_flight = cache_bytes // PagedCache.token_bytes(model)
        self._engine: Engine | None = None

    @classmethod
    def configured(cls, model: LanguageModel, tokenizer: Tokenizer | None, sampling: Sampling) -> Sampler:
        """A sampler with the budget that the options --sampling.* give it."""
        return cls(
            model,
            tokenizer,
            max_tokens_in_flight=sampling.max_tokens_in_flight,
            cache_bytes=sampling.cache_bytes,
            keep_cache=sampling.keep_cache,
            max_rows=sampling.max_rows,
            logits_dtype=getattr(torch, sampling.logits_dtype),
        )

    @property
    def timing(self) -> dict[str, float]:
        """Seconds of the last call by phase; the rest of its time the host spent elsewhere."""
        return dict(self._engine.timing) if self._engine else {}

    @property
    def peak_pages(self) -> int:
        """Pages of the cache that the last call had in use at once, by the host's snapshots."""
        return self._engine.peak_pages if self._engine else 0

    def release(self) -> None:
        """Free the cache's memory until the next call."""
        if self._engine:
            self._engine.release()

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams,
        *,
        sequence_offset: int = 0,
        weight_version: int = 0,
        on_tokens: OnTokens | None = None,
        environment: Environment | None = None,
        tail: Tail | None = None,
        carried: Rollouts | None = None,
        lengths: Lengths | None = None,
    ) -> Rollouts:
        """`params.n` completions of every prompt; sequence i answers prompt i // n.

        sequence_offset   number of the first sequence, the second part of the randomness key
        weight_version    recorded with every token drawn
        on_tokens(n)      called with every n tokens drawn
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
        if is_exact() and self.logits_dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"logits_dtype: expected torch.float32 in exact mode, got {self.logits_dtype}; "
                "the trainer's logits are not rounded"
            )
        if lengths is not None and (len(lengths) != len(prompts) or min(lengths, default=1) < 1):
            raise UserError(
                f"lengths: expected {len(prompts)} positive numbers, one for each prompt, got {list(lengths)}"
            )
        jobs = [*carried_jobs(carried, params), *self._new(prompts, params, sequence_offset, lengths)]
        if not jobs:
            return self._collect(State(PagedCache(self.model, 0, PAGE), 0, 0, 0, self.model.device), jobs)

        engine = self._ready_engine()
        max_lengths = self._max_lengths(jobs, params, with_observations=environment is not None)
        try:
            self._begin(engine, jobs, max_lengths, self._settings(params, weight_version), environment)
            write_records(engine.state, jobs, carried)
            queue_jobs(engine, jobs, max_lengths)
            self._run(engine, len(jobs), on_tokens, tail)
            return self._collect(engine.state, jobs)
        finally:
            if not self.keep_cache:
                engine.release()

    # --- what a call asks for ---
    def _limit(self, params: SamplingParams) -> int:
        """Tokens of the longest sequence."""
        context = self.model.config.max_position_embeddings
        return min(context, params.max_length or context)

    def _new(
        self, prompts: Prompts, params: SamplingParams, offset: int, lengths: Lengths | None
    ) -> list[Job]:
        """params.n jobs for every prompt."""
        limit, limit_name = self._limit(params), "max_length" if params.max_length else "the model's context"
        jobs = []
        for i, tokens in enumerate(tokenize(prompts, self.tokenizer, self.model.config.vocab_size)):
            check_room(len(tokens), f"prompts[{i}]", limit, limit_name)
            budget = params.max_new_tokens if lengths is None else lengths[i]
            first = offset + i * params.n
            jobs += new_jobs(tokens, i, budget, range(first, first + params.n))
        return jobs

    def _max_lengths(
        self, jobs: Sequence[Job], params: SamplingParams, *, with_observations: bool
    ) -> list[int]:
        """Tokens each sequence may have.  Observations count in them, but not in a job's budget."""
        limit = self._limit(params)
        lengths = []
        for job in jobs:
            allowed = limit if with_observations else min(limit, len(job.prompt) + job.budget)
            lengths.append(max(job.length, allowed))
        return lengths

    def _settings(self, params: SamplingParams, version: int) -> CallSettings:
        eos = self.model.config.eos_token_id
        return CallSettings(
            seed=params.seed,
            temperature=params.temperature,
            filters=(params.top_k, params.top_p, params.min_p),
            stops=stop_tokens(params.stop, self.tokenizer, eos),
            version=version,
        )

    # --- running it ---
    def _ready_engine(self) -> Engine:
        """The engine of earlier calls, or a new one where the model is another."""
        engine = self._engine
        if engine is None or engine.model is not self.model:
            engine = Engine(
                self.model,
                tokens=self.max_tokens_in_flight,
                max_rows=self.max_rows,
                prefill_tokens=self.prefill_tokens,
                logits_dtype=self.logits_dtype,
            )
            self._engine = engine
        engine.tokens = self.max_tokens_in_flight
        return engine

    def _begin(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        max_lengths: Sequence[int],
        settings: CallSettings,
        environment: Environment | None,
    ) -> None:
        handler = None
        if environment is not None:
            handler = TurnHandler(engine, environment, [len(job.prompt) for job in jobs])
        pages = sum(pages_of(n, PAGE) + 1 for n in max_lengths)
        engine.begin(len(jobs), max(max_lengths), pages, settings, handler)

    def _run(self, engine: Engine, S: int, on_tokens: OnTokens | None, tail: Tail | None) -> None:
        """Window after window, until all are done or only the tail is left."""
        reported, going = 0, True
        while going:
            going = engine.window()
            if on_tokens is not None and (total := engine.drawn(wait=not going)) > reported:
                on_tokens(total - reported)
                reported = total
            if going and tail is not None and not len(engine.queue) and engine.unfinished() <= tail.share * S:
                engine.end(ENDS[tail.action])
                going = False
        engine.finish()

    # --- what it returns ---
    def _collect(self, state: State, jobs: Sequence[Job]) -> Rollouts:
        """The records of the call's sequences, packed."""
        device, S, records = self.model.device, len(jobs), state.records
        lengths, finish = fetch([records.length[:S], records.finish[:S]])
        ends = _ends(lengths)
        numbers = [(job.index, len(job.prompt), job.number) for job in jobs]
        by_job = torch.tensor(numbers, dtype=torch.int64).view(-1, 3).T.contiguous()
        places, cu_seqlens, by_job = send([places_of(lengths, state.C), ends, by_job], device)

        columns = (column.view(-1).index_select(0, places) for column in records[:6])
        tokens, logp, behaviour_logp, entropy, chosen, version = columns
        prompt_index, prompt_lengths, sequence = by_job
        reasons = [REASONS[code] for code in finish.tolist()]
        versions = torch.where(chosen, version.long(), -1)
        text = self._text(tokens, ends, jobs)
        return Rollouts(
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            completion_mask=chosen,
            prompt_index=prompt_index,
            prompt_lengths=prompt_lengths,
            sequence=sequence,
            logp=logp,
            behaviour_logp=behaviour_logp,
            entropy=entropy,
            weight_version=versions,
            text=text,
            finish_reason=reasons,
        )

    def _text(self, tokens: Tensor, ends: Tensor, jobs: Sequence[Job]) -> list[str] | None:
        """The completions as text; None without a tokenizer.  `ends` of the packed tokens are on the host."""
        if self.tokenizer is None:
            return None
        packed, borders = tokens.tolist(), ends.tolist()
        sides = zip(jobs, borders, borders[1:], strict=False)
        ids = [packed[start + len(job.prompt) : end] for job, start, end in sides]
        # of no sequences, a tokenizer makes one empty text
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []


def _ends(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
