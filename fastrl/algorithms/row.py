"""What every row of a table offers to the code that trains it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from fastrl.algorithms.correction import Correction
from fastrl.batch.types import Tokens

Level = Literal["token", "sequence"]


class Loggable(Protocol):
    """Decides whether a run logs metrics of the KL (kl_coef is not 0) and of the correction (not None)."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference model in the loss."""

    @property
    def correction(self) -> Correction | None:
        """Importance weight of the sampler against the trainer."""


class LossRow(Loggable, Protocol):
    """A row that turns loss tokens into a loss."""

    @property
    def level(self) -> Level:
        """What the loss is evaluated on: "token" if any subset of tokens will do, "sequence" if it needs all
        tokens of a sequence together.
        """

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward uses log-probs of a reference model."""

    def loss(self, tokens: Tokens) -> Tensor:
        """These tokens' share of the optimizer step's loss, differentiable in their logp and entropy."""


class PolicyRow(LossRow, Protocol):
    """A row of policy gradients, with the diagnostics of `ops.policy_loss`."""

    def corrected(self, tokens: Tokens) -> Tokens:
        """The tokens with their correction, where the row has one."""

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Diagnostics of these tokens."""


class WithoutKl:
    """The part of `Loggable` that every row without a KL and without importance weights shares."""

    __slots__ = ()

    @property
    def kl_coef(self) -> float:
        """0: there is no KL term."""
        return 0.0

    @property
    def correction(self) -> Correction | None:
        """None: no importance weight of the sampler enters the loss."""
        return None
