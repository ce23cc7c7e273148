"""Losses of hybrids: several kinds of tokens in one, and a policy loss with a loss of offline pairs beside
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.algorithms.group_preference import under_pairs
from fastrl.algorithms.hybrid import MEMBER, OWN, SUPERVISED, HybridAlgorithm
from fastrl.batch.transfer import send
from fastrl.batch.types import Batch, Tokens
from fastrl.methods.dpo.objective import UnitObjective
from fastrl.parallel.world import World
from fastrl.train.learner import accumulate, as_rows
from fastrl.train.objective import PartNumbers, PolicyObjective
from fastrl.train.optimizer import MasterWeights
from fastrl.train.source import Metrics

POLICY, PAIRS = 0.0, 1.0  # which term a row of numbers is of
Term = tuple[float, Batch, float]  # which term it is, its micro-batch, the pairs' coefficient


@dataclass(frozen=True, slots=True)
class HybridObjective:
    """The loss of every kind of token; metrics tell the policy's own tokens from those of demonstrations."""

    policy: PolicyObjective
    algorithm: HybridAlgorithm

    def split(self, batch: Batch, budget: int) -> Iterable[Batch]:
        """Micro-batches of whole sequences."""
        return self.policy.split(batch, budget)

    def loss(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss; the policy's numbers, then those of other kinds of tokens."""
        scores = self.policy.score(part)
        tokens = scores.live_tokens
        own = self.policy.measure(scores.loss, only(tokens, OWN, _places(part, OWN)))
        return scores.loss, torch.cat([own, _counts(tokens)])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The loss is of all tokens; ratios, clip fractions and the like are of the policy's own, and absent
        where it has none.
        """
        metrics = self.policy.metrics([row[:-4] for row in rows])
        members, member_nll, taught, nll = (math.fsum(row[i] for row in rows) for i in range(-4, 0))
        metrics["num_tokens"] += members + taught

        if self.algorithm.others and metrics["num_tokens"] > 0:
            metrics["off_policy_share"] = (members + taught) / metrics["num_tokens"]
        if taught:
            metrics["sft_loss"] = nll / taught
        if members:
            metrics["member_nll"] = member_nll / members
        return metrics


def _counts(tokens: Tokens) -> Tensor:
    """Members: how many, and their negative log-likelihood, nats; the same of supervised tokens; (4,)
    float64.
    """
    assert tokens.kind is not None
    kinds, nll = tokens.kind, -tokens.logp.double()
    one = torch.ones_like(nll)
    sums = [torch.where(kinds == kind, x, 0).sum() for kind in (MEMBER, SUPERVISED) for x in (one, nll)]
    return torch.stack(sums).detach()


def _places(part: Batch, kind: int) -> Tensor:
    """(M,) int64: the tokens of one kind among those that count, found on the host."""
    host = part.host
    assert host.kind is not None
    found = (host.kind[host.mask] == kind).nonzero().squeeze(1)
    return send([found], part.tokens.device)[0]


def only(tokens: Tokens, kind: int, rows: Tensor | None = None) -> Tokens:
    """The tokens of one kind; sequences of others keep their places, without tokens.

    rows  (M,) int64: which they are; without them they are looked for, which waits for a device
    """
    assert tokens.kind is not None
    kept = tokens.kind == kind
    rows = kept.nonzero().squeeze(1) if rows is None else rows
    entropy = None if tokens.entropy is None else tokens.entropy[rows]
    taken = tokens[rows].with_(tokens.logp[rows], entropy)
    if tokens.cu_seqlens is None:
        return replace(taken, cu_seqlens=None)

    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return replace(taken, cu_seqlens=before[tokens.cu_seqlens.long()].to(torch.int32))


@dataclass(frozen=True, slots=True)
class PolicyAndPairsBatch:
    """One optimizer step's rollouts and offline pairs.

    policy    rollouts
    pairs     offline pairs, their weights multiplied by `coef`; None where that is 0
    measured  whether the gradient's norm is asked for term by term
    """

    policy: Batch
    pairs: Batch | None
    coef: float
    measured: bool


@dataclass(frozen=True, slots=True)
class Both:
    """The sum of a policy loss and a loss of offline pairs."""

    policy: HybridObjective
    pairs: UnitObjective

    def split(self, batch: PolicyAndPairsBatch, budget: int) -> Iterator[Term]:
        """The policy's micro-batches, then those of the pairs."""
        yield from self.policy_parts(batch, budget)
        yield from self.pair_parts(batch, budget)

    def policy_parts(self, batch: PolicyAndPairsBatch, budget: int) -> Iterator[Term]:
        """The policy's micro-batches."""
        for part in self.policy.split(batch.policy, budget):
            yield POLICY, part, batch.coef

    def pair_parts(self, batch: PolicyAndPairsBatch, budget: int) -> Iterator[Term]:
        """Micro-batches of whole pairs."""
        if batch.pairs is None:
            return
        for part in self.pairs.split(batch.pairs, budget):
            yield PAIRS, part, batch.coef

    def loss(self, part: Term) -> tuple[Tensor, Tensor]:
        """A term's share of the loss; which term it is, the pairs' coefficient, and the term's numbers."""
        term, batch, coef = part
        objective = self.pairs if term == PAIRS else self.policy
        loss, numbers = objective.loss(batch)
        which, share = (numbers.new_full((1,), x) for x in (term, coef))
        return loss, torch.cat([which, share, numbers])

    def metrics(self, rows: PartNumbers) -> Metrics:
        """The policy's metrics, and the pairs' under names of their own."""
        policy = self.policy.metrics([row[2:] for row in rows if row[0] == POLICY])
        pairs = [row for row in rows if row[0] == PAIRS]
        if not pairs:
            return policy

        loss = math.fsum(row[2] for row in pairs)
        merged = self.pairs.algorithm.merge([row[3:] for row in pairs])
        both = {
            "loss": policy["loss"] + loss,
            "num_tokens": policy["num_tokens"] + merged["num_tokens"],
        }
        return policy | under_pairs(merged) | {"pairs/loss": loss / pairs[0][1]} | both


def gradients_by_term(
    objective: Both,
    batch: PolicyAndPairsBatch,
    weights: MasterWeights,
    world: World,
    micro_tokens: int,
) -> tuple[Metrics, float]:
    """As train.learner.gradients; with each term's gradient norm where the batch asks for it."""
    policy = accumulate(objective.loss, objective.policy_parts(batch, micro_tokens), micro_tokens)
    first = [None if p.grad is None else p.grad.clone() for p in weights.masters] if batch.measured else []
    pairs = accumulate(objective.loss, objective.pair_parts(batch, micro_tokens), micro_tokens)

    world.sum_gradients(weights.masters)
    squares = _squares(first, weights, world) if batch.measured else ()
    *rows, (norm,) = as_rows([*policy, *pairs, *squares, weights.norm()])
    parts = len(policy) + len(pairs)
    metrics = objective.metrics(world.gather(rows[:parts]))
    if squares:
        rl, pairs_norm = (math.sqrt(math.fsum(row)) for row in rows[parts:])
        metrics |= {"grad_norm/rl": rl, "grad_norm/pairs": pairs_norm}
    return metrics, norm


def _squares(first: Sequence[Tensor | None], weights: MasterWeights, world: World) -> tuple[Tensor, Tensor]:
    """The squared L2 norm of each term's gradient as it is in the sum, coefficients included, weight by
    weight: (W,) float64, the policy's first.

    `first` is this process's part of the policy's gradient; the sum is in the masters.  That takes no further
    pass over the data: the pairs' gradient is what the sum has beside the policy's.
    """
    masters = weights.masters
    whole = [p.grad for p in masters]
    for p, grad in zip(masters, first, strict=True):
        p.grad = grad
    world.sum_gradients(masters)

    zero = masters[0].new_zeros(())
    own = [zero if p.grad is None else p.grad for p in masters]
    for p, grad in zip(masters, whole, strict=True):
        p.grad = grad
    pairs = [a if g is None else g - a for g, a in zip(whole, own, strict=True)]
    return _squared(own), _squared(pairs)


def _squared(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in grads])
