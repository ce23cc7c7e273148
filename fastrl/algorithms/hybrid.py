"""Supervised and reinforcement learning in one loss: the table of hybrids.

Every gradient of post-training has four parts (UPGE, Lv et al. 2025):

    1_stable (1 / pi_den) A grad pi  =  W grad logp,        W = 1_stable A exp(logp - log pi_den)

A batch holds sequences of three KINDS: the policy's own completions; demonstrations that are one more member
of a prompt's group, with an advantage of their own; and demonstrations that are supervised.  The parts are
columns of the batch: the denominator is `old_logp`, the advantage is `advantage`, the stabiliser is the
surrogate's gate times `correction`, and `weight` holds the aggregate.  An `Estimator` sets these parts for
demonstrations; an algorithm of ALGORITHMS does so for the policy's own tokens.  The equations are in
docs/hybrid.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.advantage import Advantage
from fastrl.algorithms.objective import ALGORITHMS, Algorithm, HoldsPolicy
from fastrl.algorithms.preference import Preference
from fastrl.algorithms.prepare import Prepare
from fastrl.algorithms.row import Level
from fastrl.algorithms.schedule import Schedule, rise_and_fall
from fastrl.algorithms.sequence import mean
from fastrl.batch.types import Tokens
from fastrl.ops import SURROGATES, Surrogate

KINDS = ("own", "member", "supervised")  # the meaning of the numbers in `Batch.kind`
OWN, MEMBER, SUPERVISED = range(3)

DENOMINATORS: dict[str, Callable[[Tokens], Tensor]] = {  # log pi_den of each token
    "policy": lambda tokens: tokens.logp.detach(),  # SFT, REINFORCE
    "old": lambda tokens: tokens.old_logp,  # PPO and its kin; recorded for the policy's completions alone
    "one": lambda tokens: torch.zeros_like(tokens.logp),  # LUFFY, SRFT: the author's policy is unknown
}


# --- one kind's part of the loss --------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Estimator:
    """The four parts of the gradient for demonstrations of one kind.

    surrogate    what is maximised, its gate included
    denominator  a row of DENOMINATORS
    factor       (tokens, surrogate) -> (N,) constant weight of each token; None for 1
    whole        whether the factor needs every token of a sequence at once
    """

    surrogate: Surrogate
    denominator: str
    factor: Prepare | None = None
    whole: bool = False

    def loss(self, tokens: Tokens, mask: Tensor) -> Tensor:
        """The masked-in tokens' share of the step's loss."""
        factor = None if self.factor is None else self.factor(tokens, self.surrogate)
        return ops.policy_loss(
            tokens.logp,
            DENOMINATORS[self.denominator](tokens),
            tokens.advantage,
            surrogate=self.surrogate,
            token_weight=tokens.weight,
            correction=factor,
            mask=mask,
        )[0]


def phi(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """CHORD: p (1 - p) of each token, largest where the policy is unsure."""
    p = tokens.logp.detach().exp()
    return p * (1 - p)


def certain(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """SRFT, supervised tokens: exp(-H) / 2, H the mean entropy of the demonstration under the policy."""
    return 0.5 * (-mean(_entropy(tokens), tokens)).exp()


def uncertain(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """SRFT, the policy's own tokens: exp(H) / 10 where the advantage is positive, else 1; times their
    correction.
    """
    weight = torch.where(tokens.advantage > 0, 0.1 * mean(_entropy(tokens), tokens).exp(), 1.0)
    return weight if tokens.correction is None else weight * tokens.correction


def _entropy(tokens: Tokens) -> Tensor:
    if tokens.entropy is None:
        raise ValueError("entropy: expected (N,), got None; SRFT's weights depend on it")
    return tokens.entropy.detach()


def _sign(reward: Tensor, group: int, length: Tensor) -> Tensor:
    """1 where the reward is above 0, else -1; 0 where there is none."""
    return torch.where(reward.isnan(), 0, torch.where(reward > 0, 1.0, -1.0)).to(reward.dtype)


# --- how much each kind of a prompt's sequences counts ------------------------------------------------
Parts = tuple[Tensor | float, Tensor | float, Tensor | float]  # by KINDS


@dataclass(frozen=True, slots=True)
class Rule:
    """The coefficient of each kind of a prompt's sequences: `compute(solved (P,), present (P,), step, steps,
    **params)`, by KINDS.

    solved   share of the prompt's completions that are right, NaN where none was scored
    present  whether the prompt has a demonstration
    A kind with coefficient 0 leaves the batch, and its denominators.
    """

    compute: Callable[..., Parts]
    params: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, solved: Tensor, present: Tensor, step: int, steps: int) -> Tensor:
        """(P, 3) coefficients."""
        own, member, supervised = self.compute(solved, present, step, steps, **self.params)
        one, known = torch.ones_like(solved), present.to(solved.dtype)
        return torch.stack([own * one, member * known, supervised * known], 1)


def _gate(solved: Tensor, present: Tensor, step: int, steps: int, *, gate: float, sft_coef: float) -> Parts:
    shut = present & (solved <= gate)
    return (~shut).to(solved.dtype), 0.0, sft_coef * shut


# (own, supervised) by the eighths of a prompt's completions that are right
SOFT = (
    (0.0, 1.0),
    (0.0, 1.0),
    (0.125, 0.5),
    (0.25, 0.25),
    (0.5, 0.125),
    (1.0, 0.0),
    (1.0, 0.0),
    (1.0, 0.0),
    (1.0, 0.0),
)


def _soft(solved: Tensor, present: Tensor, step: int, steps: int, *, sft_coef: float) -> Parts:
    """By SOFT; a prompt without a reward or a demonstration is trained by its rewards alone."""
    alone = ~present | solved.isnan()
    eighth = torch.where(alone, 1, solved).mul(8).floor().long()
    own, supervised = solved.new_tensor(SOFT)[eighth].unbind(1)
    return own, 0.0, sft_coef * supervised


def _union(solved: Tensor, present: Tensor, step: int, steps: int) -> Parts:
    return 1.0, 1.0, 0.0


def _all(solved: Tensor, present: Tensor, step: int, steps: int, *, sft_coef: float) -> Parts:
    return 1.0, 1.0, sft_coef


def _fixed(
    solved: Tensor, present: Tensor, step: int, steps: int, *, sft_coef: float, rl_coef: float
) -> Parts:
    return rl_coef, 0.0, sft_coef


def _mu(solved: Tensor, present: Tensor, step: int, steps: int, *, mu: float) -> Parts:
    return 1 - mu, 0.0, mu


def _schedule(
    solved: Tensor,
    present: Tensor,
    step: int,
    steps: int,
    *,
    mu: float,
    mu_end: float,
    mu_warmup: float,
    mu_decay: float,
) -> Parts:
    now = rise_and_fall(step, steps, peak=mu, end=mu_end, warmup=mu_warmup, decay=mu_decay)
    return 1 - now, 0.0, now


# --- the table --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class OfflinePairs:
    """A loss of offline pairs beside the policy's loss, a mean over the pairs of the optimizer step.

    preference  a row of PREFERENCES
    coef        its weight over the run
    """

    preference: Preference
    coef: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridAlgorithm(HoldsPolicy):
    """A row: an algorithm for the policy's own completions, and the use made of demonstrations or pairs.

    policy         trains the policy's own completions; KL and entropy bonus are of their tokens
    rule           the coefficient of each kind of a prompt's sequences
    member         demonstrations that join their prompt's group, aggregated like completions; None for none
    supervised     demonstrations with an advantage of 1, a mean over their tokens of the whole step; None for
                   none
    own_advantage  advantage of the completions, where it is not the group's
    known          what is known of a prompt: "demonstrations", "pairs" of a chosen and a rejected completion,
                   or "nothing"
    sides          how many of the known completions join the prompt's group as members
    pairs          a loss of offline pairs beside this one; None for none
    The loss is a mean over prompts, each with the rule's coefficients.
    """

    policy: Algorithm
    rule: Rule
    member: Estimator | None = None
    supervised: Estimator | None = None
    own_advantage: Advantage | None = None
    known: Literal["demonstrations", "pairs", "nothing"] = "demonstrations"
    sides: int = 1
    pairs: OfflinePairs | None = None

    @property
    def others(self) -> list[int]:
        """The kinds of a prompt's sequences after its completions, in order."""
        return [MEMBER] * (self.sides if self.member else 0) + [SUPERVISED] * (self.supervised is not None)

    @property
    def estimators(self) -> dict[int, Estimator]:
        """The demonstrations' parts of the loss, by kind."""
        parts = {MEMBER: self.member, SUPERVISED: self.supervised}
        return {kind: part for kind, part in parts.items() if part is not None}

    @property
    def level(self) -> Level:
        """See `Algorithm.level`."""
        whole = any(part.whole for part in self.estimators.values())
        return "sequence" if whole else self.policy.level

    def loss(self, tokens: Tokens) -> Tensor:
        """The share of the step's loss of tokens of every kind, differentiable in their logp and entropy."""
        loss = self._of_policy(tokens)[0]
        assert tokens.kind is not None, "_of_policy() has refused that"
        for kind, part in self.estimators.items():
            loss = loss + part.loss(tokens, tokens.kind == kind)
        return loss

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Diagnostics of the policy's own tokens (see `ops.policy_loss`)."""
        return self._of_policy(tokens)[1]

    def _of_policy(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        if tokens.kind is None:
            raise ValueError("kind: expected the kind (N,) of each token's sequence, got None")
        return self.policy.evaluate(tokens, tokens.kind == OWN)


_GRPO, _DR_GRPO = ALGORITHMS["grpo"], ALGORITHMS["dr_grpo"]
_UNCLIPPED = replace(_DR_GRPO, surrogate=SURROGATES["ratio"])
_NLL = Estimator(SURROGATES["pg"], "policy")  # -A logp with an advantage of 1

HYBRIDS: dict[str, HybridAlgorithm] = {
    "hpt": HybridAlgorithm(
        policy=_UNCLIPPED, rule=Rule(_gate, {"gate": 0.0, "sft_coef": 1.0}), supervised=_NLL
    ),
    "hpt_soft": HybridAlgorithm(policy=_UNCLIPPED, rule=Rule(_soft, {"sft_coef": 1.0}), supervised=_NLL),
    "luffy": HybridAlgorithm(
        policy=_UNCLIPPED, rule=Rule(_union), member=Estimator(SURROGATES["luffy_off"], "one")
    ),
    "srft": HybridAlgorithm(
        policy=replace(_GRPO, prepare=(uncertain,)),
        rule=Rule(_all, {"sft_coef": 1.0}),
        own_advantage=Advantage(_sign, least=1),
        member=Estimator(SURROGATES["ratio"], "one"),
        supervised=Estimator(SURROGATES["pg"], "policy", certain, whole=True),
    ),
    "chord": HybridAlgorithm(
        policy=_GRPO,
        rule=Rule(_schedule, {"mu": 0.9, "mu_end": 0.05, "mu_warmup": 0.0, "mu_decay": 0.0}),
        supervised=_NLL,
    ),
    "chord_phi": HybridAlgorithm(
        policy=_GRPO, rule=Rule(_mu, {"mu": 0.1}), supervised=Estimator(SURROGATES["pg"], "policy", phi)
    ),
    "mixed": HybridAlgorithm(
        policy=_GRPO, rule=Rule(_fixed, {"sft_coef": 1.0, "rl_coef": 1.0}), supervised=_NLL
    ),
}
