"""What flows between the stages: sampler -> Rollouts -> Batch -> learner.

Everything is packed: T tokens of S sequences lie end to end, and `cu_seqlens` (S+1,) marks their ends.
A per-token vector is indexed by the token it speaks of: `logp[t]` is the log-probability of `tokens[t]`
given the tokens before it in the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

# of Rollouts
_PER_TOKEN = (
    "tokens",
    "completion_mask",
    "logp",
    "behaviour_logp",
    "entropy",
    "weight_version",
)
_PER_SEQUENCE = ("prompt_index", "prompt_lengths", "sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """S sampled sequences, prompts included, on the device of the model that sampled them.

    tokens           (T,)   int64   prompt and completion tokens
    cu_seqlens       (S+1,) int32   sequence i is tokens[cu_seqlens[i]:cu_seqlens[i+1]]
    completion_mask  (T,)   bool    True where the policy chose the token (its end-of-sequence token included)
    prompt_index     (S,)   int64   which prompt of the call each sequence answers
    prompt_lengths   (S,)   int64   prompt tokens of each sequence
    logp             (T,)   fp32    nats, at the sampling temperature over the full vocabulary: the old
                     log-prob
    behaviour_logp   (T,)   fp32    nats, after top-k, top-p and min-p: what the sampler drew from
    entropy          (T,)   fp32    nats, of the distribution `logp` refers to; NaN where the sampler does not
                     know it
    weight_version   (T,)   int64   optimizer steps the weights had seen when the token was drawn
    finish_reason           "stop" or "length", one per sequence; "unfinished" where a later call is to go on
    text                    decoded completions, None without a tokenizer
    sequence         (S,)   int64   each sequence's number, the key of its randomness; None where the sampler
                     has none

    logp, behaviour_logp and entropy are 0, and weight_version is -1, where completion_mask is False.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    completion_mask: Tensor
    prompt_index: Tensor
    prompt_lengths: Tensor
    logp: Tensor
    behaviour_logp: Tensor
    entropy: Tensor
    weight_version: Tensor
    finish_reason: list[str]
    text: list[str] | None = None
    sequence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.finish_reason)

    @property
    def lengths(self) -> Tensor:
        """(S,) int64: completion tokens of each sequence."""
        return self.cu_seqlens.diff().long() - self.prompt_lengths

    def select(self, samples: Sequence[int]) -> Rollouts:
        """The rollouts of the named sequences, in the order given."""
        ends = self.cu_seqlens.tolist()
        parts = [torch.arange(ends[i], ends[i + 1], device=self.tokens.device) for i in samples]
        take = torch.cat(parts) if parts else self.tokens.new_empty(0)
        rows = torch.tensor(list(samples), dtype=torch.int64, device=self.tokens.device)
        cu = torch.cat([rows.new_zeros(1), self.cu_seqlens.diff().long()[rows].cumsum(0)]).to(torch.int32)
        taken: dict[str, Any] = {name: getattr(self, name)[take] for name in _PER_TOKEN}
        taken |= {
            name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in _PER_SEQUENCE
        }
        reasons, text = self.finish_reason, self.text
        said = None if text is None else [text[i] for i in samples]
        return replace(self, cu_seqlens=cu, finish_reason=[reasons[i] for i in samples], text=said, **taken)

    @staticmethod
    def join(parts: Sequence[Rollouts]) -> Rollouts:
        """The sequences of several calls as those of one, in order."""
        if len(parts) == 1:
            return parts[0]
        columns: dict[str, Any] = {
            f.name: [getattr(part, f.name) for part in parts] for f in fields(Rollouts)
        }
        for name, base in (
            ("cu_seqlens", [int(p.cu_seqlens[-1]) for p in parts]),
            ("prompt_index", [_prompts(p) for p in parts]),
        ):
            starts = [sum(base[:i]) for i in range(len(parts))]
            columns[name] = [x + start for x, start in zip(columns[name], starts, strict=True)]
        columns["cu_seqlens"] = [x if i == 0 else x[1:] for i, x in enumerate(columns["cu_seqlens"])]
        joined: dict[str, Any] = {}
        for name, values in columns.items():
            if isinstance(values[0], Tensor):
                joined[name] = torch.cat(values)
            else:
                joined[name] = None if None in values else [x for part in values for x in part]
        return Rollouts(**joined)

    def completions(self) -> list[list[int]]:
        """Completion tokens of every sequence, as Python lists (synchronises with the device)."""
        tokens, ends, prompts = self.tokens.tolist(), self.cu_seqlens.tolist(), self.prompt_lengths.tolist()
        return [tokens[a + p : b] for a, b, p in zip(ends[:-1], ends[1:], prompts, strict=True)]


def _prompts(rollouts: Rollouts) -> int:
    return int(rollouts.prompt_index.amax()) + 1 if len(rollouts) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One optimizer step's worth of sequences, or a micro-batch of it.

    tokens     (T,)   int64
    cu_seqlens (S+1,) int32
    mask       (T,)   bool    True where the token counts in the loss; never a sequence's first token
    advantage  (T,)   fp32    1 for supervised tokens
    old_logp   (T,)   fp32    under the weights that sampled the token, nats; 0 for supervised tokens
    weight     (T,)   fp32    the aggregate: what multiplies a token's loss, global denominators inside
    correction (T,)   fp32    importance weight of sampler against trainer, or None for 1
    ref_logp   (T,)   fp32    under the reference model, or None
    sampler_logp (T,) fp32    what the sampler recorded, where old_logp is not that; else None
    value      (T,)   fp32    what a critic expected before the token when it was sampled, in the reward's
               unit; else None
    returns    (T,)   fp32    what it should have expected; else None
    kind       (T,)   int64   whose token it is (fastrl.algorithms.hybrid.KINDS), or None where all are of one
               kind
    number     (T,)   int64   the sequence's place among those of the step, all processes included, or None
               where nobody asks
    """

    tokens: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    advantage: Tensor
    old_logp: Tensor
    weight: Tensor
    correction: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    value: Tensor | None = None
    returns: Tensor | None = None
    kind: Tensor | None = None
    number: Tensor | None = None

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def live_ends(self) -> Tensor:
        """(S+1,) int32: where each sequence ends among the tokens that count in the loss."""
        counted = self.mask.long().cumsum(0)
        return torch.cat([counted.new_zeros(1), counted])[self.cu_seqlens.long()].to(torch.int32)

    def rows(self, samples: Sequence[int]) -> Tensor:
        """Indices into T of the named sequences' tokens, in the order given, int64."""
        ends = self.cu_seqlens.tolist()
        parts = [torch.arange(ends[i], ends[i + 1], device=self.tokens.device) for i in samples]
        return torch.cat(parts) if parts else self.tokens.new_empty(0)

    def select(self, samples: Sequence[int]) -> Batch:
        """The batch of the named sequences, in the order given."""
        take = self.rows(samples)
        lengths = self.cu_seqlens.diff()[list(samples)]
        cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        per_token = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cu_seqlens"}
        taken: dict[str, Any] = {k: None if v is None else v[take] for k, v in per_token.items()}
        return replace(self, cu_seqlens=cu, **taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The N loss tokens of a micro-batch, as an algorithm sees them: vectors, no vocabulary.

    logp, entropy          (N,)   under the policy being trained, nats; what the loss is differentiated by
    old_logp               (N,)   nats
    advantage, weight      (N,)   see `Batch`
    correction, ref_logp, sampler_logp, kind   (N,)   or None
    cu_seqlens             (S+1,) int32, ends of the sequences among the `live` tokens; None in a token-level
                           chunk,
                                  which may cut a sequence in two
    live                   how many of the tokens count in the loss
    """

    old_logp: Tensor
    advantage: Tensor
    weight: Tensor
    correction: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    kind: Tensor | None = None
    cu_seqlens: Tensor | None = None
    live: int = 0
    logp: Tensor = field(default_factory=lambda: torch.empty(0))
    entropy: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Tokens:
        """The tokens at `rows` (int64 indices); sequence ends survive only when every live token is asked
        for.
        """
        whole = rows.numel() == self.live
        names = ("old_logp", "advantage", "weight", "correction", "ref_logp", "sampler_logp", "kind")
        taken: dict[str, Any] = {
            n: None if getattr(self, n) is None else getattr(self, n)[rows] for n in names
        }
        return Tokens(**taken, cu_seqlens=self.cu_seqlens if whole else None, live=rows.numel())

    def with_(self, logp: Tensor, entropy: Tensor | None) -> Tokens:
        """The same tokens under the current policy's log-probs and entropies."""
        return replace(self, logp=logp, entropy=entropy)
