"""The table of methods.  A method is a row: advantage | ratio | surrogate | aggregate | KL; nothing branches on its name.

Everything here is plain PyTorch on (N,) vectors of loss tokens; the vocabulary lives in `ops.linear_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastrl import ops
from fastrl.algorithms.advantage import ADVANTAGES, Advantage
from fastrl.algorithms.aggregate import Aggregate, fixed_length, sequence_mean, sequence_sum, token_mean
from fastrl.ops import SURROGATES, Surrogate
from fastrl.types import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One method.

    advantage     rewards of a group -> advantage of each sample; None for supervised tokens, whose advantage is 1
    surrogate     (log-ratio, logp, advantage) -> what is maximised, per token
    aggregate     how tokens are averaged, with denominators of the whole optimizer step
    ratio         importance ratio of each "token", or the length-normalised ratio of its "sequence"
    kl, kl_coef   estimator and weight of the KL to the reference model; no reference model is kept at 0
    entropy_coef  weight of the entropy bonus
    """

    surrogate: Surrogate
    aggregate: Aggregate
    advantage: Advantage | None = None
    ratio: Literal["token", "sequence"] = "token"
    kl: str | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def loss(self, tokens: Tokens) -> Tensor:
        """These tokens' share of the step's loss, differentiable in their logp and entropy."""
        return self._policy_loss(tokens)[0]

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Diagnostics of these tokens (see `ops.policy_loss`), the same for every method."""
        return self._policy_loss(tokens)[1]

    def _policy_loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.policy_loss(
            tokens.logp,
            tokens.old_logp,
            tokens.advantage,
            surrogate=self.surrogate,
            token_weight=tokens.weight,
            ratio=self.ratio,
            cu_seqlens=tokens.cu_seqlens if self.ratio == "sequence" else None,
            kl=self.kl if tokens.ref_logp is not None else None,
            kl_coef=self.kl_coef,
            ref_logp=tokens.ref_logp,
            correction=tokens.correction,
            entropy=tokens.entropy,
            entropy_coef=self.entropy_coef,
        )


def _clip(low: float, high: float) -> Surrogate:
    return SURROGATES["clip"].with_params(low=low, high=high)


ALGORITHMS: dict[str, Algorithm] = {
    "sft": Algorithm(surrogate=SURROGATES["nll"], aggregate=token_mean),
    "grpo": Algorithm(advantage=ADVANTAGES["zscore"], surrogate=_clip(0.2, 0.2), aggregate=sequence_mean),
    "dr_grpo": Algorithm(advantage=ADVANTAGES["center"], surrogate=_clip(0.2, 0.2), aggregate=fixed_length),
    "dapo": Algorithm(advantage=ADVANTAGES["zscore"], surrogate=_clip(0.2, 0.28), aggregate=token_mean),
    "gspo": Algorithm(advantage=ADVANTAGES["zscore"], ratio="sequence", surrogate=_clip(3e-4, 4e-4), aggregate=sequence_mean),
    "cispo": Algorithm(advantage=ADVANTAGES["zscore"], surrogate=SURROGATES["cispo"], aggregate=token_mean),
    "rloo": Algorithm(advantage=ADVANTAGES["rloo"], surrogate=SURROGATES["pg"], aggregate=sequence_sum),
}
