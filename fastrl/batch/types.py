"""What flows between the stages: sampler -> Rollouts -> Batch -> learner.

Everything is packed: T tokens of S sequences lie end to end, and `cu_seqlens` (S+1,) marks their ends.  A
per-token column is indexed by the token it describes: `logp[t]` is the log-probability of `tokens[t]` given
the tokens before it in the same sequence.  A new column is one field here, with its axis (see columns.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.batch import columns
from fastrl.batch.columns import column, rows_of, take_tokens
from fastrl.batch.transfer import fetch, send


class Turn(NamedTuple):
    """Neighbouring tokens of one speaker: the policy where `own`, else what answered it."""

    own: bool
    tokens: list[int]


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
    finish_reason    (S,)           "stop" or "length"; "unfinished" where a later call resumes the sequence
    text             (S,)           everything after the prompt as text, observations included; None without a
                     tokenizer
    sequence         (S,)   int64   each sequence's number, the key of its randomness; None where the sampler
                     has none
    messages         (S,)           the conversation after the prompt as chat messages, in a task of several
                     turns; else None

    logp, behaviour_logp and entropy are 0, and weight_version is -1, where completion_mask is False.
    """

    tokens: Tensor = field(metadata=column("T"))
    cu_seqlens: Tensor
    completion_mask: Tensor = field(metadata=column("T"))
    prompt_index: Tensor = field(metadata=column("S", within_call=True))
    prompt_lengths: Tensor = field(metadata=column("S"))
    logp: Tensor = field(metadata=column("T"))
    behaviour_logp: Tensor = field(metadata=column("T"))
    entropy: Tensor = field(metadata=column("T"))
    weight_version: Tensor = field(metadata=column("T"))
    finish_reason: list[str] = field(metadata=column("S"))
    text: list[str] | None = field(default=None, metadata=column("S"))
    sequence: Tensor | None = field(default=None, metadata=column("S"))
    messages: list[list[dict[str, str]]] | None = field(default=None, metadata=column("S"))

    def __len__(self) -> int:
        return len(self.finish_reason)

    @property
    def lengths(self) -> Tensor:
        """(S,) int64: tokens of each sequence that the policy chose.  What an environment said between
        them does not count.
        """
        return _live_ends(self.completion_mask, self.cu_seqlens).diff().long()

    @property
    def said(self) -> Sequence[str | list[dict[str, str]]] | None:
        """(S,) what reward functions and logs are shown: messages of a conversation, else text."""
        return self.text if self.messages is None else self.messages

    def select(self, samples: Sequence[int]) -> Rollouts:
        """The rollouts of the named sequences, in the order given."""
        return columns.select(self, samples)

    @staticmethod
    def join(parts: Sequence[Rollouts]) -> Rollouts:
        """The sequences of several calls as those of one, in order."""
        return columns.join(parts)

    def completions(self) -> list[list[int]]:
        """The tokens of every sequence that the policy chose, as Python lists (synchronises with the
        device).
        """
        tokens = self.tokens[self.completion_mask].tolist()
        ends = _live_ends(self.completion_mask, self.cu_seqlens).tolist()
        return [tokens[start:end] for start, end in pairwise(ends)]

    def turns(self) -> list[list[Turn]]:
        """Everything after each sequence's prompt, cut where the speaker changes (synchronises with the
        device).
        """
        tokens, chosen = self.tokens.tolist(), self.completion_mask.tolist()
        ends, prompts = self.cu_seqlens.tolist(), self.prompt_lengths.tolist()
        found = []
        for (start, end), prompt in zip(pairwise(ends), prompts, strict=True):
            pairs = zip(chosen[start + prompt : end], tokens[start + prompt : end], strict=True)
            runs = groupby(pairs, key=itemgetter(0))
            found.append([Turn(own, [token for _, token in run]) for own, run in runs])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One optimizer step's worth of sequences, or a micro-batch of it.

    tokens     (T,)   int64
    cu_seqlens (S+1,) int32
    mask       (T,)   bool    True where the token counts in the loss; never a sequence's first token
    advantage  (T,)   fp32    1 for supervised tokens
    old_logp   (T,)   fp32    denominator of the ratio, nats: as the sampler recorded it, or, where
               sampler_logp is set, under the trainer's weights before the batch's first update; 0 for
               supervised tokens
    weight     (T,)   fp32    the aggregate: what multiplies a token's loss, global denominators inside
    correction (T,)   fp32    importance weight of sampler against trainer, or None for 1
    ref_logp   (T,)   fp32    under the reference model, or None
    sampler_logp (T,) fp32    what the sampler recorded, where old_logp is not that; else None
    value      (T,)   fp32    what a critic expected before the token when it was sampled, in the reward's
               unit; else None
    returns    (T,)   fp32    what it should have expected; else None
    kind       (T,)   int64   kind of sequence the token belongs to (fastrl.algorithms.hybrid.KINDS), or None
               where all are of one kind
    number     (T,)   int64   the sequence's place among those of the step, all processes included; None
               unless noise is keyed by position (NEFTune)
    baseline   (T,)   fp32    KTO's z0, the same number everywhere, nats; None for other losses
    known      what the host knows of it, so that cutting it into micro-batches waits for no device; None
               where that must be read first, and after a column that it repeats was replaced
    """

    tokens: Tensor = field(metadata=column("T"))
    cu_seqlens: Tensor
    mask: Tensor = field(metadata=column("T"))
    advantage: Tensor = field(metadata=column("T"))
    old_logp: Tensor = field(metadata=column("T"))
    weight: Tensor = field(metadata=column("T"))
    correction: Tensor | None = field(default=None, metadata=column("T"))
    ref_logp: Tensor | None = field(default=None, metadata=column("T"))
    sampler_logp: Tensor | None = field(default=None, metadata=column("T"))
    value: Tensor | None = field(default=None, metadata=column("T"))
    returns: Tensor | None = field(default=None, metadata=column("T"))
    kind: Tensor | None = field(default=None, metadata=column("T"))
    number: Tensor | None = field(default=None, metadata=column("T"))
    baseline: Tensor | None = field(default=None, metadata=column("T"))
    known: Known | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.known is not None and not self.known.repeats(self):
            object.__setattr__(self, "known", None)

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def live_ends(self) -> Tensor:
        """(S+1,) int32: where each sequence ends among the tokens that count in the loss."""
        return _live_ends(self.mask, self.cu_seqlens)

    def per_token(self, values: Tensor) -> Tensor:
        """(T,) each sequence's value (S,), for each of its tokens."""
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(values, lengths, output_size=self.tokens.numel())

    @property
    def host(self) -> HostColumns:
        """Its shape and tokens, on the host.  Waits for the device where they are not known yet."""
        known = self.known or Known.read(self)
        return known.columns

    def with_known(self) -> Batch:
        """The batch with `known`, as far as that is not itself.  Waits for the device where it is missing."""
        if self.known is not None or self.tokens.device.type == "cpu":
            return self
        return replace(self, known=Known.read(self))

    def to(self, device: torch.device) -> Batch:
        """A batch that was made on the host, on `device`, by one copy for which nobody waits."""
        if device.type == "cpu":
            return self
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        sent = send([getattr(self, name) for name in names], device)
        columns_there: dict[str, Any] = dict(zip(names, sent, strict=True))
        there = replace(self, **columns_there)
        return replace(there, known=Known.between(there, self))

    def select(self, samples: Sequence[int]) -> Batch:
        """The batch of the named sequences, in the order given."""
        if self.known is None:
            return columns.select(self, samples)
        host = columns.select(self.known.columns, samples)
        there = columns.select(self, samples, self.known.columns.cu_seqlens)
        return replace(there, known=Known.between(there, host))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostColumns:
    """The columns of a `Batch` that decide what is computed of it, on the host."""

    tokens: Tensor = field(metadata=column("T"))
    cu_seqlens: Tensor
    mask: Tensor = field(metadata=column("T"))
    advantage: Tensor = field(metadata=column("T"))
    kind: Tensor | None = field(default=None, metadata=column("T"))
    number: Tensor | None = field(default=None, metadata=column("T"))

    def __len__(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def live_ends(self) -> Tensor:
        """See `Batch.live_ends`."""
        return _live_ends(self.mask, self.cu_seqlens)

    def rows(self, samples: Sequence[int]) -> Tensor:
        """Indices into T of the named sequences' tokens, in the order given, int64."""
        return rows_of(self.cu_seqlens.tolist(), samples)


REPEATED = tuple(f.name for f in fields(HostColumns))


@dataclass(frozen=True, slots=True)
class Known:
    """What the host knows of a batch on a device.

    columns  the batch's own, on the host
    there    the columns on the device that these repeat, in the order of REPEATED
    """

    columns: HostColumns
    there: tuple[Tensor | None, ...]

    @classmethod
    def between(cls, batch: Batch, host: Batch | HostColumns) -> Known:
        """Of a batch that is the same as `host`."""
        own = {name: getattr(host, name) for name in REPEATED}
        return cls(HostColumns(**own), _repeated(batch))

    @classmethod
    def read(cls, batch: Batch) -> Known:
        """Read from the device, by one copy.  Waits for it."""
        present = {name: x for name, x in zip(REPEATED, _repeated(batch), strict=True) if x is not None}
        values = fetch(list(present.values()))
        return cls(HostColumns(**dict(zip(present, values, strict=True))), _repeated(batch))

    def repeats(self, batch: Batch) -> bool:
        """Whether these are still the batch's columns."""
        return all(a is b for a, b in zip(self.there, _repeated(batch), strict=True))


def _live_ends(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    counted = mask.long().cumsum(0)
    before = torch.cat([counted.new_zeros(1), counted])
    return before[cu_seqlens.long()].to(torch.int32)


def _repeated(batch: Batch) -> tuple[Tensor | None, ...]:
    return tuple(getattr(batch, name) for name in REPEATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The N loss tokens of a micro-batch, as an algorithm sees them: vectors, no vocabulary.

    Its columns are those of a `Batch` by the same names.

    logp, entropy          (N,)   under the policy being trained, nats; what the loss is differentiated by
    old_logp               (N,)   nats
    advantage, weight      (N,)   see `Batch`
    correction, ref_logp, sampler_logp, kind   (N,)   or None
    cu_seqlens             (S+1,) int32, ends of the sequences among the `live` tokens; None in a token-level
                           chunk, which may cut a sequence in two
    live                   how many of the tokens count in the loss
    """

    old_logp: Tensor = field(metadata=column("T"))
    advantage: Tensor = field(metadata=column("T"))
    weight: Tensor = field(metadata=column("T"))
    correction: Tensor | None = field(default=None, metadata=column("T"))
    ref_logp: Tensor | None = field(default=None, metadata=column("T"))
    sampler_logp: Tensor | None = field(default=None, metadata=column("T"))
    kind: Tensor | None = field(default=None, metadata=column("T"))
    cu_seqlens: Tensor | None = None
    live: int = 0
    # of the policy as it is now, so no columns of the batch: `with_` sets them
    logp: Tensor = field(default_factory=lambda: torch.empty(0))
    entropy: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Tokens:
        """The tokens at `rows` (int64 indices), without log-probs and entropies of the policy.

        Sequence ends survive only when every live token is asked for.
        """
        live = rows.numel()
        taken = take_tokens(self, Tokens, rows)
        ends = self.cu_seqlens if live == self.live else None
        return Tokens(**taken, cu_seqlens=ends, live=live)

    def with_(self, logp: Tensor, entropy: Tensor | None) -> Tokens:
        """The same tokens under the current policy's log-probs and entropies."""
        return replace(self, logp=logp, entropy=entropy)


def token_columns(batch: Batch, rows: Tensor) -> Tokens:
    """The batch's tokens 1..T-1 as an algorithm sees them; `rows` are the live ones."""
    taken = take_tokens(batch, Tokens, slice(1, None))
    return Tokens(**taken, cu_seqlens=batch.live_ends, live=rows.numel())
