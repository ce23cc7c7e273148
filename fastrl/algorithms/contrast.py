"""Losses of a group's completions against each other, whose rewards say which are better: on-policy pairs,
and whole lists.

A completion's score is what it is in preference.py: its log-prob's excess over the reference, summed over its
tokens or averaged.  The loss is differentiated by the scores alone; rewards are numbers of the batch, and no
gradient reaches what made them.

Batches are as types.Batch says, with these columns: `advantage` is the completion's reward, NaN where it has
none, `weight` is 1 / units of the whole optimizer step, and `unit` sequences of one prompt lie next to each
other.  The equations are in docs/hybrid.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastrl.algorithms.preference import Preference, Scores
from fastrl.batch.types import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """What both kinds of rows have.

    preference  what a score is, and for pairs what two of them cost
    anchor      what log-probs are compared with: those of the model that the run began with, or of the "old"
                policy that sampled
    group       completions of a prompt
    """

    preference: Preference
    anchor: Literal["start", "old"] = "start"
    group: int = 2

    # what a source and a learner ask of any row: see objective.Algorithm
    level: ClassVar[Literal["sequence"]] = "sequence"
    ratio: ClassVar[Literal["sequence"]] = "sequence"
    kl_coef: ClassVar[float] = 0.0
    entropy_coef: ClassVar[float] = 0.0
    correction: ClassVar[None] = None
    advantage: ClassVar[None] = None

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of a reference model are asked for."""
        return self.preference.reference and self.anchor == "start"

    @property
    def unit(self) -> int:
        """Sequences of a prompt that stay together in a micro-batch."""
        return self.group

    def kept(self, reward: Tensor) -> Tensor:
        """(P, unit) int64: which of each prompt's completions, whose rewards are (P, G),
        the loss is about.
        """
        return torch.arange(self.group, device=reward.device).expand(len(reward), self.group)

    def units(self, reward: Tensor) -> Tensor:
        """(P,) int64: how many losses the kept completions of each prompt give, from their rewards (P,
        unit).
        """
        raise NotImplementedError

    def scores(self, tokens: Tokens) -> tuple[Scores, Tensor]:
        """The completions' scores, and their rewards (P, unit): NaN where there is none, or no token that
        counts.
        """
        s = self.preference.scores(tokens)
        assert tokens.cu_seqlens is not None
        first = tokens.cu_seqlens[:-1].long().clamp(max=max(tokens.advantage.numel() - 1, 0))
        reward = torch.where(s.length > 0, tokens.advantage[first].detach(), torch.nan)
        return s._replace(length=s.length.clamp_min(1)), reward.view(-1, self.unit)


# --- pairs ------------------------------------------------------------------------------------------
def _extremes(reward: Tensor) -> Tensor:
    """The best and the worst completion of each prompt, the first of equals."""
    best, worst = reward.nan_to_num(-torch.inf).argmax(1), reward.nan_to_num(torch.inf).argmin(1)
    return torch.stack([best, worst], 1)


# rewards (P, G) -> kept (P, 2)
PAIRINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "extremes": _extremes,
    "all": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlinePairs(Contrast):
    """A loss of pairs, on those that the rewards of a group make: the one with more is chosen.

    pairing  a row of PAIRINGS: the best against the worst, or every pair
    gap      the least difference of two rewards that makes a pair; equal rewards never do
    """

    pairing: str = "extremes"
    gap: float = 0.0

    @property
    def unit(self) -> int:
        return self.group if PAIRINGS[self.pairing] is None else 2

    def kept(self, reward: Tensor) -> Tensor:
        choose = PAIRINGS[self.pairing]
        return Contrast.kept(self, reward) if choose is None else choose(reward)

    def units(self, reward: Tensor) -> Tensor:
        return self._better(reward).flatten(1).sum(1)

    def loss(self, tokens: Tokens) -> Tensor:
        """These groups' share of the step's loss, differentiable in the tokens' logp."""
        s = self._pairs(tokens)
        return (self.preference.per_unit(s) * s.weight[::2]).sum()

    def measure(self, tokens: Tokens) -> Tensor:
        """As Preference.measure, of the pairs; then how many tokens there are."""
        sums = self.preference.sums(self._pairs(tokens), None)
        return torch.cat([sums, sums.new_tensor([float(tokens.logp.numel())])])

    def merge(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """A step's metrics, from `measure` of every micro-batch of every process."""
        return under_pairs(self.preference.merge([row[:-1] for row in rows])) | {
            "num_tokens": math.fsum(row[-1] for row in rows)
        }

    def _better(self, reward: Tensor) -> Tensor:
        """(P, U, U) bool: whether the first of two completions beats the second."""
        ahead = reward[:, :, None] - reward[:, None, :]
        return (ahead > 0) & (ahead >= self.gap)  # NaN is neither

    def _pairs(self, tokens: Tokens) -> Scores:
        """Scores of the chosen and the rejected completions of all pairs in turn, (2 N,)."""
        s, reward = self.scores(tokens)
        prompt, chosen, rejected = self._better(reward).nonzero().unbind(1)
        at = (prompt[:, None] * self.unit + torch.stack([chosen, rejected], 1)).flatten()
        good = torch.arange(len(at), device=at.device) % 2 == 0
        return Scores(s.score[at], s.logp[at], s.length[at], good, s.weight[at])


def under_pairs(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of pairs under names that leave those of rewards alone; without counts of tokens and what
    is averaged over them.
    """
    return {
        f"pairs/{name}": value for name, value in metrics.items() if name not in ("num_tokens", "entropy")
    }


# --- lists ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Listwise(Contrast):
    """Cross-entropy of the policy's choice among a group's completions, softmax(beta score), against
    softmax(reward / tau).
    """

    tau: float = 0.5

    def units(self, reward: Tensor) -> Tensor:
        return ((~reward.isnan()).sum(1) > 1).long()

    def loss(self, tokens: Tokens) -> Tensor:
        """These groups' share of the step's loss, differentiable in the tokens' logp."""
        share, log_p, weight = self._choices(tokens)
        return -((share * log_p).sum(1) * weight).sum()

    def measure(self, tokens: Tokens) -> Tensor:
        """Groups, tokens, and the KL of the groups' targets to the policy's choices; float64."""
        share, log_p, _ = self._choices(tokens)
        kl = (torch.special.xlogy(share, share) - share * log_p).double().sum()
        return torch.stack([kl.new_tensor(float(len(share))), kl.new_tensor(float(tokens.logp.numel())), kl])

    def merge(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """A step's metrics, from `measure` of every micro-batch of every process."""
        groups, tokens, kl = map(math.fsum, zip(*rows, strict=True)) if rows else (0.0, 0.0, 0.0)
        return {"num_tokens": tokens} | ({"group_kl": kl / groups} if groups else {})

    def _choices(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """(P, G) targets w, (P, G) log p, both 0 where a completion has no reward, and (P,) the groups'
        weights.
        """
        s, reward = self.scores(tokens)
        known, beta = ~reward.isnan(), self.preference.params["beta"]
        score = (s.score / s.length if self.preference.average else s.score).view_as(reward)
        log_p = torch.where(known, beta * score, -torch.inf).log_softmax(1)
        share = torch.where(known, reward.double() / self.tau, -torch.inf).softmax(1)
        weight = torch.where(known, s.weight.view_as(reward), 0).amax(1)
        return share.to(score.dtype), torch.where(known, log_p, 0), weight
