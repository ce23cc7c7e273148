"""What every row of a table offers to the code that trains it."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from fastrl.algorithms.correction import Correction
from fastrl.batch.types import Tokens

Level = Literal["token", "sequence"]


class Loggable(Protocol):
    """What decides which metrics a run logs: they are absent without a KL, or without a correction."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference model in the loss."""

    @property
    def correction(self) -> Correction | None:
        """Importance weight of the sampler against the trainer."""


class Row(Loggable, Protocol):
    """A row that turns loss tokens into a loss."""

    @property
    def level(self) -> Level:
        """Whether the loss may be evaluated on any tokens, or needs every token of a sequence at once."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward uses log-probs of a reference model."""

    def loss(self, tokens: Tokens) -> Tensor:
        """These tokens' share of the optimizer step's loss, differentiable in their logp and entropy."""


class PolicyRow(Row, Protocol):
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
