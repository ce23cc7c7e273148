"""The table of preference losses.  A loss is a row: the rule that turns the scores of a pair (or of a
labelled example) into a loss | what a score is | the NLL term; nothing branches on its name.  Equations and
sources are in docs/dpo.md.

A completion's score is its log-prob's excess over the reference, sum over its tokens (logp - ref_logp), or
without a reference its log-prob; `average` divides by its tokens.  Everything here is plain PyTorch on (S,)
vectors of sequences, differentiated through `ops.linear_loss(level="sequence")`: the gradient of a token's
log-prob is its sequence's scalar, and the vocabulary is never seen.

Batches are as types.Batch says, with these columns: `advantage` is +1 for tokens of chosen and desirable
completions and -1 for the others; `weight` is 1 / units of the whole optimizer step; a pair's two sequences
are adjacent, the chosen one first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrl.algorithms.preference_rules import (
    alpha_divergence,
    apo_down,
    apo_zero,
    apo_zero_unpaired,
    bco,
    cdpo,
    discopop,
    dpo,
    dpop,
    exo,
    forward_kl,
    hinge,
    ipo,
    jensen_shannon,
    kto,
    nca,
    orpo,
    robust,
    simpo,
    sppo,
)
from fastrl.algorithms.row import WithoutKl
from fastrl.batch.types import Tokens
from fastrl.report.metric import ratios
from fastrl.report.metrics import PREFERENCE_METRICS

# (chosen, rejected, **params) -> loss of each pair;  of examples: (score, good, **params) -> loss of each
Rule = Callable[..., Tensor]
SUMS = (
    "units",
    "tokens",
    "entropy",
    "nll",
    "accurate",
    *(f"{x}_{side}" for side in ("good", "bad") for x in ("n", "reward", "logp")),
)


class Scores(NamedTuple):
    """What the loss needs to know of S sequences: each (S,).

    score   nats: summed log-prob over the reference's, or the log-prob alone
    logp    nats, summed
    length  loss tokens
    good    chosen or desirable
    weight  of the unit the sequence belongs to
    """

    score: Tensor
    logp: Tensor
    length: Tensor
    good: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference(WithoutKl):
    """One loss.

    rule       the loss of two scores, or with `paired` False of one score and its label
    params     the rule's parameters; `beta` also scales the rewards that are logged.  A `baseline` among them
               is KTO's z0, which the learner sets at every step
    paired     pairs of a chosen and a rejected completion, or single completions labelled good or bad
    reference  whether scores are log-ratios to a reference model
    average    whether scores are divided by the completion's tokens
    transform  f' of an f-divergence (f-DPO), applied to the scores first; None is the reverse KL
    tail       weight of tokens beyond the length of the pair's shorter completion (LD-DPO)
    nll        weight of the chosen completion's cross-entropy, nats per token, added to each pair's loss
    """

    rule: Rule
    params: Mapping[str, float | Tensor] = field(default_factory=lambda: {"beta": 0.1})
    paired: bool = True
    reference: bool = True
    average: bool = False
    transform: Callable[[Tensor], Tensor] | None = None
    tail: float = 1.0
    nll: float = 0.0

    @property
    def level(self) -> Literal["sequence"]:
        """Every token of a sequence is needed at once."""
        return "sequence"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of a reference model."""
        return self.reference

    @property
    def unit(self) -> int:
        """Sequences of one loss term: 2 of a pair, or 1; a micro-batch holds whole units."""
        return 2 if self.paired else 1

    @property
    def mismatched(self) -> bool:
        """Whether the rule compares with completions of other prompts (KTO's z0)."""
        return "baseline" in self.params

    def with_params(self, **params: float | Tensor) -> Preference:
        """The row with parameters of its rule changed."""
        return replace(self, params={**self.params, **params})

    def loss(self, tokens: Tokens) -> Tensor:
        """These sequences' share of the step's loss, differentiable in the tokens' logp."""
        s = self.scores(tokens)
        return (self.per_unit(s) * s.weight[:: self.unit]).sum()

    def per_unit(self, s: Scores) -> Tensor:
        """The loss of each pair, (S/2,), or of each example, (S,)."""
        score = s.score if self.transform is None else self.transform(s.score)
        score = score / s.length if self.average else score
        sides = score.view(-1, 2).unbind(1) if self.paired else (score, s.good)
        value = self.rule(*sides, **self.params)
        if not self.nll:
            return value
        chosen = (s.logp / s.length)[:: self.unit]
        return value - self.nll * chosen

    def scores(self, tokens: Tokens) -> Scores:
        """The sequences' sums, taken in float64: a difference of long sums loses no digits."""
        if tokens.cu_seqlens is None:
            raise ValueError(
                "cu_seqlens: expected the ends of whole sequences, got None; "
                'evaluate the loss with level="sequence"'
            )
        if self.reference and tokens.ref_logp is None:
            raise ValueError(
                "ref_logp: expected the reference model's log-probs, got None; this row compares with them"
            )
        ends, each = tokens.cu_seqlens.long(), tokens.logp
        if self.reference and tokens.ref_logp is not None:
            each = tokens.logp - tokens.ref_logp
        if self.tail != 1.0:
            each = each * self._tail_weight(ends, each.numel()).to(each.dtype)
        # empty sequences get an arbitrary valid index (masked later)
        first = ends[:-1].clamp(max=max(each.numel() - 1, 0))
        return Scores(
            score=_sum(each, ends),
            logp=_sum(tokens.logp, ends),
            length=ends.diff().to(each.dtype),
            good=tokens.advantage[first] > 0,
            weight=tokens.weight[first],
        )

    def _tail_weight(self, ends: Tensor, tokens: int) -> Tensor:
        length = ends.diff()
        # where each sequence's tail begins
        shorter = ends[:-1] + length.view(-1, 2).amin(1).repeat_interleave(2)
        limit = shorter.repeat_interleave(length, output_size=tokens)
        place = torch.arange(tokens, device=ends.device)
        return torch.where(place < limit, 1.0, self.tail)

    def measure(self, tokens: Tokens) -> Tensor:
        """Sums over these sequences for `merge`, float64, in the order of SUMS."""
        return self.sums(self.scores(tokens), tokens.entropy)

    def sums(self, s: Scores, token_entropy: Tensor | None) -> Tensor:
        """`measure` from the sequences' scores and the entropy of each of their tokens."""
        score = s.score / s.length if self.average else s.score
        reward = self.params["beta"] * score
        accurate = s.length.new_zeros(())
        if self.paired:
            chosen, rejected = reward.view(-1, 2).unbind(1)
            accurate = (chosen > rejected).sum()

        entropy = s.logp.new_zeros(()) if token_entropy is None else token_entropy.sum()
        nll = torch.where(s.good, -s.logp / s.length, 0).sum()
        units = s.length.new_full((), s.length.numel() // self.unit)
        out = [units, s.length.sum(), entropy, nll, accurate]
        for side in (s.good, ~s.good):
            rewards, logps = torch.where(side, reward, 0), torch.where(side, s.logp, 0)
            out += [side.sum(), rewards.sum(), logps.sum()]
        return torch.stack([x.double() for x in out])

    def merge(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """A step's metrics under TRL's names, from `measure` of every micro-batch of every process."""
        sums = map(math.fsum, zip(*rows, strict=True)) if rows else [0.0] * len(SUMS)
        total = dict(zip(SUMS, sums, strict=True))
        if not self.paired:
            del total["accurate"]

        # A step may have no example of one label: its metrics are absent then.
        out = {"num_tokens": total["tokens"]} | ratios(PREFERENCE_METRICS, total)
        if total["n_good"] and total["n_bad"]:
            out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out


def _sum(x: Tensor, ends: Tensor) -> Tensor:
    return torch.segment_reduce(x.double(), "sum", offsets=ends, unsafe=True).to(x.dtype)


PREFERENCES: dict[str, Preference] = {
    "dpo": Preference(rule=dpo),
    "cdpo": Preference(rule=cdpo, params={"beta": 0.1, "label_smoothing": 0.1}),
    "robust": Preference(rule=robust, params={"beta": 0.1, "label_smoothing": 0.1}),
    "hinge": Preference(rule=hinge),
    "ipo": Preference(rule=ipo, average=True),
    "dpo_norm": Preference(rule=dpo, params={"beta": 5.0}, average=True),
    "ld_dpo": Preference(rule=dpo, tail=0.5),
    "dpop": Preference(rule=dpop, params={"beta": 0.3, "penalty": 50.0}),
    "rpo": Preference(rule=dpo, nll=1.0),
    "exo": Preference(rule=exo, params={"beta": 0.1, "label_smoothing": 1e-3}),
    "nca": Preference(rule=nca, params={"beta": 0.01}),
    "bco": Preference(rule=bco, params={"beta": 0.01}),
    "sppo": Preference(rule=sppo, params={"beta": 0.001}),
    "apo_zero": Preference(rule=apo_zero),
    "apo_down": Preference(rule=apo_down),
    "discopop": Preference(rule=discopop, params={"beta": 0.05, "tau": 0.05}),
    "dpo_forward_kl": Preference(rule=dpo, transform=forward_kl),
    "dpo_js": Preference(rule=dpo, transform=jensen_shannon),
    "dpo_alpha": Preference(rule=dpo, transform=alpha_divergence),
    "simpo": Preference(rule=simpo, params={"beta": 2.0, "gamma": 1.0}, reference=False, average=True),
    "cpo": Preference(rule=dpo, reference=False, nll=1.0),
    "orpo": Preference(rule=orpo, reference=False, average=True, nll=1.0),
    "kto": Preference(
        rule=kto,
        params={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "baseline": 0.0},
        paired=False,
    ),
    "apo_zero_unpaired": Preference(
        rule=apo_zero_unpaired,
        params={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        paired=False,
    ),
}
