"""The rollout engine: prompts in, packed `Rollouts` out.

Sequences are admitted in waves that fit the cache budget.  A wave prefills each distinct prompt once, copies its keys and values
to the G samples of that prompt, and then decodes all rows together; finished rows are compacted away.  Randomness is keyed by
(seed, sequence, position), so a sample does not depend on the batch, wave or process it was drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import ops
from fastrl.errors import UserError
from fastrl.kernels._linear import project
from fastrl.sampler.cache import PagedCache
from fastrl.sampler.prompts import Prompt, check_room, stop_tokens, tokenize
from fastrl.types import Rollouts

PAGE = 64  # tokens a cache page holds
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # decode steps between looks at how many rows are still alive
COMPACT_BELOW = 0.75  # rows are compacted when fewer than this share is alive


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    n               completions per prompt
    max_new_tokens  the longest completion, its end-of-sequence token included
    temperature     0 is greedy: log-probs are then reported at temperature 1
    top_k, top_p, min_p   filters, applied in this order; 0, 1 and 0 turn them off
    seed            with each sequence's number and position, the key of all randomness
    stop            further tokens, or strings of one token, that end a completion
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit number"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)}")


class Sampler:
    """Generates with `model`'s current weights; nothing is copied, so an optimizer step is seen by the next call.

    max_tokens_in_flight   key/value cache budget, tokens; sequences that do not fit wait for the next wave
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, max_tokens_in_flight: int = 262144) -> None:
        self.model, self.tokenizer, self.max_tokens_in_flight = model, tokenizer, max_tokens_in_flight

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, sequence_offset: int = 0, weight_version: int = 0,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Rollouts:  # fmt: skip
        """`params.n` completions of every prompt; sequence i answers prompt i // n.

        `sequence_offset` is the number of the first sequence, the second part of the randomness key; `on_tokens(n)` is told of
        every n tokens drawn.  Raises UserError for a prompt that is empty, foreign to the vocabulary or too long for the context.
        """
        config = self.model.config
        encoded = tokenize(prompts, self.tokenizer, config.vocab_size)
        limit = config.max_position_embeddings
        for i, p in enumerate(encoded):
            check_room(len(p), f"prompts[{i}]", limit)
        waves = _waves([min(len(p) + params.max_new_tokens, limit) for p in encoded for _ in range(params.n)], self.max_tokens_in_flight)
        stops = torch.tensor(stop_tokens(params.stop, self.tokenizer, config.eos_token_id), dtype=torch.int64, device=self.model.device)
        drawn = _Drawn(len(encoded) * params.n, params.max_new_tokens, self.model.device)
        for wave in waves:
            _Wave(self.model, encoded, params, stops, wave, sequence_offset, drawn).run(on_tokens)
        return self._collect(encoded, params, drawn, weight_version)

    def _collect(self, prompts: list[list[int]], params: SamplingParams, drawn: _Drawn, version: int) -> Rollouts:
        device = self.model.device
        prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(params.n)
        prompt_lengths = torch.tensor([len(p) for p in prompts], device=device, dtype=torch.int64)[prompt_index]
        counts = drawn.count.tolist()
        cu = torch.cat([prompt_lengths.new_zeros(1), (prompt_lengths + drawn.count).cumsum(0)]).to(torch.int32)
        rows = [row for p in prompts for row in [torch.tensor(p, device=device)] * params.n]
        pieces = [piece for i, row in enumerate(rows) for piece in (row, drawn.tokens[i, : counts[i]])]
        tokens = torch.cat(pieces) if pieces else prompt_index.new_empty(0)
        inside = torch.arange(params.max_new_tokens, device=device) < drawn.count[:, None]
        position = torch.arange(tokens.numel(), device=device) - torch.repeat_interleave(cu[:-1].long(), cu.diff())
        mask = position >= torch.repeat_interleave(prompt_lengths, cu.diff())

        def spread(values: Tensor, empty: float) -> Tensor:
            out = torch.full(tokens.shape, empty, dtype=values.dtype, device=device)
            out[mask] = values[inside]
            return out

        text = None
        if self.tokenizer is not None:
            ids = [drawn.tokens[i, : counts[i]].tolist() for i in range(len(counts))]
            text = self.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of none it makes one empty text
        return Rollouts(
            tokens=tokens, cu_seqlens=cu, completion_mask=mask, prompt_index=prompt_index, prompt_lengths=prompt_lengths,
            logp=spread(drawn.logp, 0), behaviour_logp=spread(drawn.behaviour_logp, 0), entropy=spread(drawn.entropy, 0),
            weight_version=torch.where(mask, version, -1), text=text,
            finish_reason=["stop" if s else "length" for s in drawn.stopped.tolist()],
        )  # fmt: skip


class _Drawn:
    """Everything drawn so far: S sequences by `max_new_tokens` columns."""

    def __init__(self, S: int, max_new_tokens: int, device: torch.device) -> None:
        self.tokens = torch.zeros(S, max_new_tokens, dtype=torch.int64, device=device)
        self.logp, self.behaviour_logp, self.entropy = (torch.zeros(S, max_new_tokens, device=device) for _ in range(3))
        self.count = torch.zeros(S, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(S, dtype=torch.bool, device=device)


class _Wave:
    """B rows decoded together.  `seq` (B,) says which sequence each row is; rows shrink as sequences finish."""

    def __init__(
        self, model: Any, prompts: list[list[int]], params: SamplingParams, stops: Tensor, sequences: range, offset: int, drawn: _Drawn
    ) -> None:
        self.model, self.params, self.stops, self.drawn, self.offset = model, params, stops, drawn, offset
        device = model.device
        self.seq = torch.tensor(list(sequences), device=device)
        self.prompts = prompts
        mine = [prompts[s // params.n] for s in sequences]
        self.length = torch.tensor([len(p) for p in mine], device=device)  # tokens of each row so far
        self.limit = torch.full_like(self.length, model.config.max_position_embeddings)
        self.history = mine if not model.supports_cache else []

    def run(self, on_tokens: Callable[[int], None] | None) -> None:
        step = self._decode if self.model.supports_cache else self._recompute
        hidden = self._prefill() if self.model.supports_cache else self._recompute(None)
        every = CHECK_EVERY.get(self.seq.device.type, 1)
        self.alive = torch.ones_like(self.seq, dtype=torch.bool)
        for t in range(self.params.max_new_tokens):
            if on_tokens is not None:
                on_tokens(int(self.alive.sum()))
            token, alive = self._draw(hidden, t)
            if t + 1 == self.params.max_new_tokens:
                return
            if (t + 1) % every == 0:
                rows = alive.nonzero().squeeze(1)
                if rows.numel() == 0:
                    return
                if rows.numel() < COMPACT_BELOW * alive.numel():
                    token, alive = self._compact(rows, token)
            self.alive = alive
            hidden = step(token)

    def _draw(self, hidden: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Draw token t of every row and record it where the row is alive; the tokens, and which rows go on."""
        p, d = self.params, self.drawn
        logits = project(hidden, self.model.head_weight, self.model.head_bias, torch.promote_types(hidden.dtype, torch.float32))
        draw = ops.sample(
            logits, seed=p.seed, sequence=self.seq + self.offset, position=torch.full_like(self.seq, t),
            temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p,
        )  # fmt: skip
        alive = self.alive
        d.tokens[self.seq, t] = torch.where(alive, draw.token, 0)
        for name in ("logp", "behaviour_logp", "entropy"):
            getattr(d, name)[self.seq, t] = torch.where(alive, getattr(draw, name).float(), 0)
        d.count[self.seq] += alive
        stopped = alive & torch.isin(draw.token, self.stops)
        d.stopped[self.seq] |= stopped
        self.length = self.length + alive
        return draw.token, alive & ~stopped & (self.length < self.limit)

    def _prefill(self) -> Tensor:
        """Fill the cache with every prompt, each forwarded once; the hidden state (B, D) that predicts the first token."""
        model, n, device = self.model, self.params.n, self.model.device
        prompt_of = self.seq // n
        distinct = sorted(set(prompt_of.tolist()))
        place = {p: i for i, p in enumerate(distinct)}
        row_prompt = torch.tensor([place[p] for p in prompt_of.tolist()], device=device)
        lengths = torch.tensor([len(self.prompts[p]) for p in distinct], device=device)
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        tokens = torch.tensor([t for p in distinct for t in self.prompts[p]], device=device)
        c = model.config
        reserve = torch.minimum(self.length + self.params.max_new_tokens, self.limit).tolist()
        self.cache = PagedCache(
            c.num_hidden_layers, c.num_key_value_heads, c.head_dim, row_tokens=reserve, page=PAGE, dtype=model.dtype, device=device
        )
        row = torch.repeat_interleave(torch.arange(self.seq.numel(), device=device), self.length)
        first = torch.repeat_interleave(self.length.cumsum(0) - self.length, self.length)
        position = torch.arange(row.numel(), device=device) - first
        longest = max(len(self.prompts[p]) for p in distinct)
        attend = self.cache.prefill(cu.to(torch.int32), longest, cu[row_prompt[row]] + position, self.cache.slots(row, position))
        hidden = model(tokens, cu.to(torch.int32), attend=attend)
        return hidden[cu[1:] - 1][row_prompt]

    def _decode(self, token: Tensor) -> Tensor:
        """Hidden states (B, D) after appending `token` to every row; a finished row overwrites its own last slot."""
        position = self.length - 1
        slots = self.cache.slots(torch.arange(token.numel(), device=token.device), position)
        attend = self.cache.decode(slots, self.length.to(torch.int32))
        return self.model(token, None, positions=position, attend=attend)

    def _recompute(self, token: Tensor | None) -> Tensor:
        """The same without a cache, for models that have none: every row is forwarded whole."""
        if token is not None:
            rows = zip(self.history, token.tolist(), self.alive.tolist(), strict=True)
            self.history = [[*h, t] if alive else h for h, t, alive in rows]
        lengths = torch.tensor([len(h) for h in self.history], device=self.seq.device)
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        tokens = torch.tensor([t for h in self.history for t in h], device=self.seq.device)
        return self.model(tokens, cu.to(torch.int32))[cu[1:] - 1]

    def _compact(self, rows: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        self.seq, self.length, self.limit = self.seq[rows], self.length[rows], self.limit[rows]
        if self.model.supports_cache:
            self.cache.keep(rows)
        else:
            self.history = [self.history[i] for i in rows.tolist()]
        return token[rows], torch.ones_like(rows, dtype=torch.bool)


def _waves(reserve: list[int], budget: int) -> list[range]:
    """Consecutive sequences cut into waves whose reserved tokens fit the budget, whole pages counted."""
    waves, start, used = [], 0, 0
    for i, need in enumerate(reserve):
        pages = -(-need // PAGE) * PAGE
        if pages > budget:
            raise UserError(f"max_tokens_in_flight: sequence {i} alone may need {pages} tokens of cache, above the budget of {budget}")
        if used + pages > budget:
            waves.append(range(start, i))
            start, used = i, 0
        used += pages
    return [*waves, range(start, len(reserve))] if reserve else []
