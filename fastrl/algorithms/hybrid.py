"""Supervised and reinforcement learning in one loss: the table of hybrids.

Every gradient of post-training has four parts (UPGE, Lv et al. 2025):

    1_stable (1 / pi_den) A grad pi  =  W grad logp,        W = 1_stable A exp(logp - log pi_den)

A batch holds sequences of three KINDS: the policy's own completions; demonstrations that are one more member
of a prompt's group, with an advantage of their own; and demonstrations that are supervised.  The parts are
columns of the batch: the denominator is `old_logp`, the advantage `advantage`, what stabilises is the
surrogate's gate times `correction`, and `weight` holds the aggregate.  An `Estimator` says what a
demonstration has in them; the policy's own tokens are a row of ALGORITHMS.  The equations are in
docs/hybrid.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from fastrl import ops
from fastrl.algorithms.advantage import Advantage
from fastrl.algorithms.objective import ALGORITHMS, Algorithm
from fastrl.algorithms.prepare import Prepare
from fastrl.algorithms.sequence import mean
from fastrl.batch.types import Tokens
from fastrl.ops import SURROGATES, Surrogate

KINDS = ("own", "member", "supervised")  # what the numbers in `Batch.kind` mean
OWN, MEMBER, SUPERVISED = range(3)

# log pi_den of each token; "old" is what is recorded, and only the policy's own completions have it
DENOMINATORS: dict[str, Callable[[Tokens], Tensor]] = {
    "policy": lambda tokens: tokens.logp.detach(),  # SFT, REINFORCE
    "old": lambda tokens: tokens.old_logp,  # PPO and its kin
    "one": lambda tokens: torch.zeros_like(
        tokens.logp
    ),  # LUFFY, SRFT: nobody knows what wrote the demonstration
}


# --- one kind's part of the loss --------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Estimator:
    """What demonstrations of one kind have for the four parts.

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
    """CHORD: p (1 - p) of each token, greatest where the policy is in doubt."""
    p = tokens.logp.detach().exp()
    return p * (1 - p)


def certain(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """SRFT, supervised tokens: exp(-H) / 2, H the mean entropy of the demonstration under the policy."""
    return 0.5 * (-mean(_entropy(tokens), tokens)).exp()


def uncertain(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """SRFT, the policy's own tokens: exp(H) / 10 where the advantage is positive, else 1; times what they are
    corrected by.
    """
    weight = torch.where(tokens.advantage > 0, 0.1 * mean(_entropy(tokens), tokens).exp(), 1.0)
    return weight if tokens.correction is None else weight * tokens.correction


def _entropy(tokens: Tokens) -> Tensor:
    if tokens.entropy is None:
        raise ValueError("entropy: expected (N,), got None; SRFT weighs by it")
    return tokens.entropy.detach()


def _sign(reward: Tensor, group: int, length: Tensor) -> Tensor:
    """1 where the reward is above 0, else -1; 0 where there is none."""
    return torch.where(reward.isnan(), 0, torch.where(reward > 0, 1.0, -1.0)).to(reward.dtype)


# --- what a prompt's sequences count ----------------------------------------------------------------
Parts = tuple[Tensor | float, Tensor | float, Tensor | float]  # by KINDS


@dataclass(frozen=True, slots=True)
class Rule:
    """How much the kinds of a prompt's sequences count: `compute(solved (P,), there (P,), step, steps,
    **params)`, of each kind.

    solved  share of the prompt's completions that are right, NaN where none was scored;  there  whether it
            has a demonstration
    A kind that counts 0 leaves the batch, and its denominators.
    """

    compute: Callable[..., Parts]
    params: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, solved: Tensor, there: Tensor, step: int, steps: int) -> Tensor:
        own, member, supervised = self.compute(solved, there, step, steps, **self.params)
        one, known = torch.ones_like(solved), there.to(solved.dtype)
        return torch.stack([own * one, member * known, supervised * known], 1)


def _gate(solved: Tensor, there: Tensor, step: int, steps: int, *, gate: float, sft_coef: float) -> Parts:
    shut = there & (solved <= gate)
    return (~shut).to(solved.dtype), 0.0, sft_coef * shut


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


def _soft(solved: Tensor, there: Tensor, step: int, steps: int, *, sft_coef: float) -> Parts:
    """By eighths of completions solved; a prompt that nothing is known of, or without a demonstration, is
    left to its rewards.
    """
    alone = ~there | solved.isnan()
    eighth = torch.where(alone, 1, solved).mul(8).floor().long()
    own, supervised = solved.new_tensor(SOFT)[eighth].unbind(1)
    return own, 0.0, sft_coef * supervised


def _union(solved: Tensor, there: Tensor, step: int, steps: int) -> Parts:
    return 1.0, 1.0, 0.0


def _all(solved: Tensor, there: Tensor, step: int, steps: int, *, sft_coef: float) -> Parts:
    return 1.0, 1.0, sft_coef


def _fixed(solved: Tensor, there: Tensor, step: int, steps: int, *, sft_coef: float, rl_coef: float) -> Parts:
    return rl_coef, 0.0, sft_coef


def _mu(solved: Tensor, there: Tensor, step: int, steps: int, *, mu: float) -> Parts:
    return 1 - mu, 0.0, mu


def rise_and_fall(step: int, steps: int, *, peak: float, end: float, warmup: float, decay: float) -> float:
    """From 0 to the peak over `warmup` steps, then by half a cosine to `end` over `decay` (0: the rest of
    `steps`).
    """
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (decay or max(steps - warmup, 1)))))
    return peak * step / warmup if step < warmup else end + (peak - end) * fall


def _schedule(
    solved: Tensor,
    there: Tensor,
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
@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Algorithm):
    """A row: an algorithm for the policy's own completions, and what becomes of the demonstrations.

    rule           how much each kind of a prompt's sequences counts
    member         demonstrations that join their prompt's group, aggregated like completions; None for none
    supervised     demonstrations with an advantage of 1, a mean over their tokens of the whole step; None for
                   none
    own_advantage  advantage of the completions, where it is not the group's
    known          what is known of a prompt, a row of commands.KNOWN: a demonstration, or a chosen and a
                   rejected completion
    sides          how many of these join its group as members
    The loss is a mean over prompts, each taught as the rule says.  KL and entropy bonus are of the policy's
    own tokens.
    """

    rule: Rule
    member: Estimator | None = None
    supervised: Estimator | None = None
    own_advantage: Advantage | None = None
    known: str = "demonstrations"
    sides: int = 1

    @property
    def others(self) -> list[int]:
        """The kinds of a prompt's sequences after its completions, in order."""
        return [MEMBER] * (self.sides if self.member else 0) + [SUPERVISED] * (self.supervised is not None)

    @property
    def estimators(self) -> dict[int, Estimator]:
        """The demonstrations' parts of the loss, by kind."""
        return {
            kind: part
            for kind, part in ((MEMBER, self.member), (SUPERVISED, self.supervised))
            if part is not None
        }

    @property
    def level(self) -> Literal["token", "sequence"]:
        whole = any(part.whole for part in self.estimators.values())
        return "sequence" if whole else Algorithm.level.fget(self)  # type: ignore[attr-defined]

    def _policy_loss(self, tokens: Tokens, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of every kind, and the metrics of the policy's own tokens."""
        if tokens.kind is None:
            raise ValueError("kind: expected (N,), whose token each is; got None")
        loss, metrics = Algorithm._policy_loss(self, tokens, tokens.kind == OWN)
        for kind, part in self.estimators.items():
            loss = loss + part.loss(tokens, tokens.kind == kind)
        return loss, metrics


def mix(base: Algorithm, rule: Rule, kind: type[Mixed] | None = None, **columns: Any) -> Mixed:
    """A row, of a kind of Mixed, whose own completions are trained by `base`, with some columns changed."""
    return (kind or Mixed)(**{f.name: getattr(base, f.name) for f in fields(Algorithm)} | columns, rule=rule)


_NLL = Estimator(SURROGATES["pg"], "policy")  # -A logp with an advantage of 1
_UNCLIPPED: dict[str, Any] = {"surrogate": SURROGATES["ratio"]}
HYBRIDS: dict[str, Mixed] = {
    "hpt": mix(
        ALGORITHMS["dr_grpo"], Rule(_gate, {"gate": 0.0, "sft_coef": 1.0}), **_UNCLIPPED, supervised=_NLL
    ),
    "hpt_soft": mix(ALGORITHMS["dr_grpo"], Rule(_soft, {"sft_coef": 1.0}), **_UNCLIPPED, supervised=_NLL),
    "luffy": mix(
        ALGORITHMS["dr_grpo"], Rule(_union), **_UNCLIPPED, member=Estimator(SURROGATES["luffy_off"], "one")
    ),
    "srft": mix(
        ALGORITHMS["grpo"],
        Rule(_all, {"sft_coef": 1.0}),
        prepare=(uncertain,),
        own_advantage=Advantage(_sign, least=1),
        member=Estimator(SURROGATES["ratio"], "one"),
        supervised=Estimator(SURROGATES["pg"], "policy", certain, whole=True),
    ),
    "chord": mix(
        ALGORITHMS["grpo"],
        Rule(_schedule, {"mu": 0.9, "mu_end": 0.05, "mu_warmup": 0.0, "mu_decay": 0.0}),
        supervised=_NLL,
    ),
    "chord_phi": mix(
        ALGORITHMS["grpo"], Rule(_mu, {"mu": 0.1}), supervised=Estimator(SURROGATES["pg"], "policy", phi)
    ),
    "mixed": mix(ALGORITHMS["grpo"], Rule(_fixed, {"sft_coef": 1.0, "rl_coef": 1.0}), supervised=_NLL),
}


# --- from a run's options to a row ------------------------------------------------------------------
