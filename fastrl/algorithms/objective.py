"""The table of policy algorithms.  An algorithm is a row: advantage | ratio | prepare | surrogate |
aggregate | KL | correction; nothing branches on its name.  The equations of the rows and their sources are in
docs/grpo.md; what other trainers do under the same names is in presets.py.

Everything here is plain PyTorch on (N,) vectors of loss tokens; the vocabulary lives in `ops.linear_loss`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from fastrl import ops
from fastrl.algorithms.advantage import ADVANTAGES, Advantage
from fastrl.algorithms.aggregate import Aggregate, fixed_length, sequence_mean, sequence_sum, token_mean
from fastrl.algorithms.correction import Correction
from fastrl.algorithms.prepare import Prepare, gamma_weight, geometric_mean
from fastrl.algorithms.row import Level
from fastrl.batch.types import Tokens
from fastrl.ops import SURROGATES, Surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One policy algorithm.

    advantage     rewards of a group -> advantage of each sample; None for supervised tokens, whose advantage
                  is 1
    surrogate     (log-ratio, logp, advantage) -> what is maximised, per token
    aggregate     how tokens are averaged, with denominators of the whole optimizer step
    ratio         importance ratio of each "token", or the length-normalised ratio of its "sequence"
    kl, kl_coef   estimator and weight of the KL to the reference model; no reference model is kept at 0
    entropy_coef  weight of the entropy bonus
    correction    importance weight of the sampler against the trainer (a row of CORRECTIONS); None trusts the
                  recorded log-probs
    prepare       token weights computed from whole sequences before the surrogate, in this order: see
                  prepare.py
    """

    surrogate: Surrogate
    aggregate: Aggregate
    advantage: Advantage | None = None
    ratio: Level = "token"
    kl: str | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    correction: Correction | None = None
    prepare: tuple[Prepare, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of a reference model."""
        return bool(self.kl_coef)

    @property
    def level(self) -> Level:
        """What the loss is evaluated on: "token" if any subset of tokens will do, "sequence" if it needs all
        tokens of a sequence together.
        """
        by_sequence = self.correction is not None and self.correction.level != "token"
        return "sequence" if self.ratio == "sequence" or self.prepare or by_sequence else "token"

    def corrected(self, tokens: Tokens) -> Tokens:
        """The tokens with their correction.  If `tokens.correction` is None it is computed here, and
        `tokens.logp` must be the trainer's from before any update on the batch.
        """
        return tokens if self.correction is None or tokens.correction is not None else self.correction(tokens)

    def loss(self, tokens: Tokens) -> Tensor:
        """These tokens' share of the step's loss, differentiable in their logp and entropy."""
        return self.evaluate(tokens)[0]

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Diagnostics of these tokens (see `ops.policy_loss`), the same for every algorithm."""
        return self.evaluate(tokens)[1]

    def evaluate(self, tokens: Tokens, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the tokens that `mask` (N,) selects; None selects all."""
        tokens = self.corrected(tokens)
        for prepare in self.prepare:
            tokens = replace(tokens, correction=prepare(tokens, self.surrogate))

        kl = self.kl if tokens.ref_logp is not None else None
        ends = tokens.cu_seqlens if self.ratio == "sequence" else None
        policy_loss = partial(ops.policy_loss, surrogate=self.surrogate, ratio=self.ratio, cu_seqlens=ends)
        return policy_loss(
            tokens.logp,
            tokens.old_logp,
            tokens.advantage,
            token_weight=tokens.weight,
            mask=mask,
            kl=kl,
            kl_coef=self.kl_coef,
            ref_logp=tokens.ref_logp,
            correction=tokens.correction,
            entropy=tokens.entropy,
            entropy_coef=self.entropy_coef,
        )


class HoldsPolicy:
    """A row that contains an algorithm for the policy, and forwards level, KL, correction, loss and metrics
    to it unless it overrides them.
    """

    __slots__ = ()
    policy: Algorithm

    @property
    def level(self) -> Level:
        """See `Algorithm.level`."""
        return self.policy.level

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses log-probs of a reference model."""
        return self.policy.needs_reference

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference model in the policy's loss."""
        return self.policy.kl_coef

    @property
    def correction(self) -> Correction | None:
        """Importance weight of the sampler against the trainer."""
        return self.policy.correction

    def corrected(self, tokens: Tokens) -> Tokens:
        """See `Algorithm.corrected`."""
        return self.policy.corrected(tokens)

    def loss(self, tokens: Tokens) -> Tensor:
        """These tokens' share of the step's loss, differentiable in their logp and entropy."""
        return self.policy.loss(tokens)

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Diagnostics of the policy's tokens (see `ops.policy_loss`)."""
        return self.policy.metrics(tokens)


def _clip(low: float, high: float, cap: float = math.inf) -> Surrogate:
    return SURROGATES["clip"].with_params(low=low, high=high, cap=cap)


def _log_clip(size: float) -> Surrogate:
    """Bounds exp(-size) and exp(size)."""
    return _clip(-math.expm1(-size), math.expm1(size))


_A, _S = ADVANTAGES, SURROGATES
ALGORITHMS: dict[str, Algorithm] = {
    "sft": Algorithm(surrogate=_S["nll"], aggregate=token_mean),
    "grpo": Algorithm(advantage=_A["zscore"], surrogate=_clip(0.2, 0.2), aggregate=sequence_mean),
    "dr_grpo": Algorithm(advantage=_A["center"], surrogate=_clip(0.2, 0.2), aggregate=fixed_length),
    "dapo": Algorithm(advantage=_A["zscore"], surrogate=_clip(0.2, 0.28), aggregate=token_mean),
    "bnpo": Algorithm(advantage=_A["zscore"], surrogate=_clip(0.2, 0.2), aggregate=token_mean),
    "lite_ppo": Algorithm(advantage=_A["batch_std"], surrogate=_clip(0.2, 0.2), aggregate=token_mean),
    "two_sided": Algorithm(advantage=_A["zscore"], surrogate=_clip(0.2, 0.2, cap=4.0), aggregate=token_mean),
    "gspo": Algorithm(
        advantage=_A["zscore"], ratio="sequence", surrogate=_clip(3e-4, 4e-4), aggregate=sequence_mean
    ),
    "luspo": Algorithm(
        advantage=_A["zscore"], ratio="sequence", surrogate=_clip(2e-3, 2.5e-3), aggregate=sequence_sum
    ),
    "gmpo": Algorithm(
        advantage=_A["zscore"], prepare=(geometric_mean,), surrogate=_log_clip(0.4), aggregate=sequence_mean
    ),
    "cispo": Algorithm(advantage=_A["zscore"], surrogate=_S["cispo"], aggregate=token_mean),
    "sapo": Algorithm(advantage=_A["zscore"], surrogate=_S["sapo"], aggregate=sequence_mean),
    "vespo": Algorithm(
        advantage=_A["zscore"], prepare=(gamma_weight,), surrogate=_S["pg"], aggregate=token_mean
    ),
    "rloo": Algorithm(advantage=_A["rloo"], surrogate=_S["pg"], aggregate=sequence_sum),
    "reinforce++": Algorithm(advantage=_A["whiten"], surrogate=_clip(0.2, 0.2), aggregate=token_mean),
    "reinforce++_baseline": Algorithm(
        advantage=_A["center_whiten"], surrogate=_clip(0.2, 0.2), aggregate=token_mean
    ),
    "gpg": Algorithm(advantage=_A["gpg"], surrogate=_S["pg"], aggregate=token_mean),
    "pass_at_k": Algorithm(advantage=_A["max_at_k"], surrogate=_clip(0.2, 0.2), aggregate=fixed_length),
    "max_rl": Algorithm(advantage=_A["max_rl"], surrogate=_clip(0.2, 0.2), aggregate=fixed_length),
}
