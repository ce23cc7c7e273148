"""Losses that compare a group's completions with each other: on-policy pairs, and whole lists.

Rewards say which completion is better.  A completion's score is that of preference.py: its log-prob, or its
log-ratio to the reference, summed over its tokens or averaged.  Only the scores are differentiated; rewards
are constants.

Batches are as types.Batch says, with these columns: `advantage` is the completion's reward, NaN where it has
none; `weight` is 1 / units of the whole optimizer step; the `unit` sequences of one prompt are adjacent.  The
equations are in docs/hybrid.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrl.algorithms.preference import Preference, Scores
from fastrl.algorithms.row import WithoutKl
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch, Tokens


class Compared(NamedTuple):
    """A micro-batch's completions, P prompts of U each.

    preference  what a score is, and for pairs what two of them cost
    scores      each (P U,)
    reward      (P, U), NaN where a completion has none, or no token that counts
    tokens      loss tokens of all of them
    """

    preference: Preference
    scores: Scores
    reward: Tensor
    tokens: int


class Comparison(Protocol):
    """How the completions of a prompt are compared."""

    def unit(self, group: int) -> int:
        """How many of a prompt's `group` completions are compared."""

    def kept(self, reward: Tensor) -> Tensor:
        """(P, unit) int64: which of them, by their rewards (P, G)."""

    def units(self, reward: Tensor) -> Tensor:
        """(P,) int64: how many loss terms each prompt gives, by the rewards (P, unit) of those kept."""

    def known(self, reward: Tensor, device: torch.device) -> Comparison:
        """The comparison of a micro-batch whose rewards (P, unit) are known on the host: what it looks up by
        them is sent to `device`.
        """

    def loss(self, compared: Compared) -> Tensor:
        """The share of the optimizer step's loss, differentiable in the scores."""

    def measure(self, compared: Compared) -> Tensor:
        """A micro-batch's sums, float64, for `merge`."""

    def merge(self, preference: Preference, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """A step's metrics, from `measure` of every micro-batch of every process."""


def _all(reward: Tensor) -> Tensor:
    """Every completion of each prompt, in order."""
    return torch.arange(reward.shape[1], device=reward.device).expand(reward.shape)


# --- pairs ------------------------------------------------------------------------------------------
def _extremes(reward: Tensor) -> Tensor:
    """The best and the worst completion of each prompt, the first of equals."""
    best = reward.nan_to_num(-torch.inf).argmax(1)
    worst = reward.nan_to_num(torch.inf).argmin(1)
    return torch.stack([best, worst], 1)


# rewards (P, G) -> the completions that pairs are made of, (P, unit)
PAIRINGS: dict[str, Callable[[Tensor], Tensor]] = {"extremes": _extremes, "all": _all}


@dataclass(frozen=True, slots=True)
class OnlinePairs:
    """A loss of pairs, on the pairs that a group's rewards make: the completion with more reward is chosen.

    pairing  a row of PAIRINGS: the best against the worst, or every pair
    gap      the least difference of two rewards that makes a pair; equal rewards never do
    places   (2 N,) of a micro-batch: which completions are the chosen and the rejected one of each of its
             pairs in turn; None where they are looked for in its rewards, which waits for a device
    """

    pairing: str = "extremes"
    gap: float = 0.0
    places: Tensor | None = None

    def known(self, reward: Tensor, device: torch.device) -> OnlinePairs:
        (places,) = send([self._places(reward)], device)
        return replace(self, places=places)

    def unit(self, group: int) -> int:
        return 2 if self.pairing == "extremes" else group

    def kept(self, reward: Tensor) -> Tensor:
        return PAIRINGS[self.pairing](reward)

    def units(self, reward: Tensor) -> Tensor:
        return self._better(reward).flatten(1).sum(1)

    def loss(self, compared: Compared) -> Tensor:
        pairs = self._pairs(compared)
        each = compared.preference.per_unit(pairs)
        return (each * pairs.weight[::2]).sum()

    def measure(self, compared: Compared) -> Tensor:
        """`Preference.sums` of the pairs, then the number of tokens."""
        sums = compared.preference.sums(self._pairs(compared), None)
        return torch.cat([sums, sums.new_full((1,), compared.tokens)])

    def merge(self, preference: Preference, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        pairs = preference.merge([row[:-1] for row in rows])
        return under_pairs(pairs) | {"num_tokens": math.fsum(row[-1] for row in rows)}

    def _better(self, reward: Tensor) -> Tensor:
        """(P, U, U) bool: whether the first of two completions beats the second."""
        ahead = reward[:, :, None] - reward[:, None, :]
        return (ahead > 0) & (ahead >= self.gap)  # False for NaN

    def _pairs(self, compared: Compared) -> Scores:
        """Scores of the chosen and the rejected completion of each of N pairs in turn, (2 N,)."""
        s = compared.scores
        at = self._places(compared.reward) if self.places is None else self.places
        good = torch.arange(len(at), device=at.device) % 2 == 0
        return Scores(s.score[at], s.logp[at], s.length[at], good, s.weight[at])

    def _places(self, reward: Tensor) -> Tensor:
        """See `places`."""
        prompt, chosen, rejected = self._better(reward).nonzero().unbind(1)
        sides = torch.stack([chosen, rejected], 1)
        first = prompt[:, None] * reward.shape[1]
        return (first + sides).flatten()


def under_pairs(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of pairs under `pairs/`, apart from those of rewards; token counts and means over tokens
    are left out.
    """
    kept = {name: value for name, value in metrics.items() if name not in ("num_tokens", "entropy")}
    return {f"pairs/{name}": value for name, value in kept.items()}


# --- lists ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Listwise:
    """Cross-entropy of the policy's choice among a group's completions, softmax(beta score), against
    softmax(reward / tau).
    """

    tau: float = 0.5

    def known(self, reward: Tensor, device: torch.device) -> Listwise:
        return self

    def unit(self, group: int) -> int:
        return group

    def kept(self, reward: Tensor) -> Tensor:
        return _all(reward)

    def units(self, reward: Tensor) -> Tensor:
        return ((~reward.isnan()).sum(1) > 1).long()

    def loss(self, compared: Compared) -> Tensor:
        target, log_p, weight = self._choices(compared)
        return -((target * log_p).sum(1) * weight).sum()

    def measure(self, compared: Compared) -> Tensor:
        """Groups, tokens, and the KL of the groups' targets to the policy's choices; float64."""
        target, log_p, _ = self._choices(compared)
        kl = (torch.special.xlogy(target, target) - target * log_p).double().sum()
        groups, tokens = (kl.new_full((1,), n) for n in (len(target), compared.tokens))
        return torch.cat([groups, tokens, kl.view(1)])

    def merge(self, preference: Preference, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        if not rows:
            return {"num_tokens": 0.0}
        groups, tokens, kl = map(math.fsum, zip(*rows, strict=True))
        metrics = {"num_tokens": tokens}
        if groups:
            metrics["group_kl"] = kl / groups
        return metrics

    def _choices(self, compared: Compared) -> tuple[Tensor, Tensor, Tensor]:
        """(P, U) targets and (P, U) log p, both 0 where a completion has no reward, and (P,) the groups'
        weights.
        """
        preference, s, reward = compared.preference, compared.scores, compared.reward
        known, beta = ~reward.isnan(), preference.params["beta"]
        score = s.score / s.length if preference.average else s.score
        score = score.view_as(reward)

        logits = torch.where(known, beta * score, -torch.inf)
        log_p = torch.where(known, logits.log_softmax(1), 0)
        wanted = torch.where(known, reward.double() / self.tau, -torch.inf)
        target = wanted.softmax(1).to(score.dtype)
        weight = torch.where(known, s.weight.view_as(reward), 0)
        return target, log_p, weight.amax(1)


# --- the row ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPreference(WithoutKl):
    """A row that compares the completions of a group.

    preference  what a score is, and for pairs what two of them cost
    comparison  on-policy pairs, or the whole list
    anchor      what log-probs are compared with: those of the model that the run began with ("start"), or of
                the policy that sampled ("old")
    group       completions of a prompt
    """

    preference: Preference
    comparison: Comparison
    anchor: Literal["start", "old"] = "start"
    group: int = 2

    @property
    def level(self) -> Literal["sequence"]:
        """Every token of a sequence is needed at once."""
        return "sequence"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of a reference model."""
        return self.preference.reference and self.anchor == "start"

    @property
    def unit(self) -> int:
        """Sequences of a prompt that stay together in a micro-batch."""
        return self.comparison.unit(self.group)

    def kept(self, reward: Tensor) -> Tensor:
        """(P, unit) int64: which of each prompt's completions are compared, by their rewards (P, G)."""
        return self.comparison.kept(reward)

    def units(self, reward: Tensor) -> Tensor:
        """(P,) int64: how many loss terms each prompt gives, by the rewards (P, unit) of those kept."""
        return self.comparison.units(reward)

    def known(self, batch: Batch) -> GroupPreference:
        """The row for a micro-batch, with what its comparison looks up by rewards."""
        host = batch.host
        first = host.cu_seqlens[:-1].long().clamp(max=max(host.advantage.numel() - 1, 0))
        live = host.live_ends.diff() > 0
        reward = torch.where(live, host.advantage[first], torch.nan).view(-1, self.unit)
        return replace(self, comparison=self.comparison.known(reward, batch.tokens.device))

    def loss(self, tokens: Tokens) -> Tensor:
        """These groups' share of the step's loss, differentiable in the tokens' logp."""
        return self.comparison.loss(self.compared(tokens))

    def measure(self, tokens: Tokens) -> Tensor:
        """A micro-batch's sums, float64, for `merge`."""
        return self.comparison.measure(self.compared(tokens))

    def merge(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """A step's metrics, from `measure` of every micro-batch of every process."""
        return self.comparison.merge(self.preference, rows)

    def compared(self, tokens: Tokens) -> Compared:
        """The completions' scores and rewards."""
        s = self.preference.scores(tokens)
        assert tokens.cu_seqlens is not None, "scores() has refused that"
        last = max(tokens.advantage.numel() - 1, 0)
        first = tokens.cu_seqlens[:-1].long().clamp(max=last)
        reward = torch.where(s.length > 0, tokens.advantage[first].detach(), torch.nan)

        scores = s._replace(length=s.length.clamp_min(1))
        reward = reward.view(-1, self.unit)
        return Compared(self.preference, scores, reward, tokens.logp.numel())
