"""Policy and critic trained side by side: one optimizer step of each over a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fastrl.batch.types import Batch
from fastrl.errors import UserError
from fastrl.methods.ppo.objective import ActorCriticBatch, Values, named, values_of
from fastrl.model.critic import ValueHead
from fastrl.train.learner import Companions, Learner
from fastrl.train.source import Metrics, State


@dataclass(frozen=True, slots=True)
class Kind:
    """Where the critic's hidden states come from.

    head          it is a head on the policy's, in the policy's optimizer; else a model of its own
    moves_policy  its loss trains the policy's weights too
    """

    head: bool
    moves_policy: bool


CRITICS = {"separate": Kind(False, False), "shared": Kind(True, True), "head": Kind(True, False)}


@final
class ActorCritic:
    """Holds a policy's learner and what values its batches.

    after   a micro-batch -> (T,) values after each of its tokens
    critic  the critic's own learner; None where it is a `head` in the policy's optimizer
    kind    its name in CRITICS, for messages
    """

    def __init__(
        self,
        policy: Learner[ActorCriticBatch],
        after: Callable[[Batch], Tensor],
        *,
        critic: Learner[Batch] | None,
        head: ValueHead | None,
        kind: str,
    ) -> None:
        self.policy, self.after, self.critic, self.head, self.kind = policy, after, critic, head, kind

    def values(self, batch: Batch) -> Values:
        """The critic's values of the batch."""
        return values_of(self.after, batch, self.policy.micro_tokens)

    def update(self, batch: ActorCriticBatch, step: int) -> Metrics:
        """One optimizer step of the policy, and of a critic with an optimizer; see `Learner.update`."""
        metrics = self.policy.update(batch, step)
        if self.critic is None:
            return metrics

        value = self.critic.update(batch.tokens, step)
        own = {"critic_grad_norm": value["grad_norm"], "critic_lr": value["learning_rate"]}
        return metrics | named(value) | own

    def companions(self) -> Companions:
        """None: a checkpoint keeps the critic in its state."""
        return {}

    def state(self) -> State:
        """`Learner.state`, and the critic's weights and state under "critic."."""
        return self.policy.state() | {f"critic.{name}": x for name, x in self._critic_state().items()}

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Restore what `state` returned.  Raises UserError for the state of another kind of critic."""
        own = {name.removeprefix("critic."): x for name, x in state.items() if name.startswith("critic.")}
        weights = self._critic_weights()
        if missing := [name for name in weights if name not in own]:
            raise UserError(
                f"--critic: expected {self.kind}'s {missing[0]} in the checkpoint; "
                "resume with the --critic that the run began with"
            )

        for name, weight in weights.items():
            weight.copy_(own[name])
        self.policy.load_state(state)
        if self.critic is not None:
            self.critic.load_state(own)

    def _critic_state(self) -> State:
        weights = self._critic_weights()
        return weights if self.critic is None else self.critic.state() | weights

    def _critic_weights(self) -> State:
        """The weights by name: a checkpoint's own folder holds the policy's alone."""
        if self.critic is None:
            assert self.head is not None
            return {name: p.detach() for name, p in self.head.named_parameters()}
        trained = self.critic.weights
        named_weights = zip(trained.names, trained.weights, strict=True)
        return {f"weight.{name}": weight.detach() for name, weight in named_weights}
