"""Policy and critic trained side by side: one optimizer step of each over a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.algorithms.ppo import VALUE_SUMS, ActorCritic, value_loss
from fastrl.batch.pack import micro_batches, plan
from fastrl.batch.types import Batch
from fastrl.config import Optim
from fastrl.errors import UserError
from fastrl.model.critic import Critic, ValueHead
from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World
from fastrl.report.metric import ratios
from fastrl.report.metrics import CRITIC_METRICS
from fastrl.train.learner import Learner


@dataclass(frozen=True, slots=True)
class Values:
    """A critic's values of a batch, in the reward's unit: (T,) before each token that counts, 0 elsewhere;
    (S,) after the last token.
    """

    before: Tensor
    last: Tensor


@torch.no_grad()
def values_of(after: Callable[[Batch], Tensor], batch: Batch, budget: int) -> Values:
    """The values of a batch from those after each token (T,) of its micro-batches, of at most `budget`
    tokens.
    """
    before = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    last = torch.zeros(len(batch), device=before.device)
    for samples in plan(batch.cu_seqlens.diff().tolist(), budget):
        micro = batch.select(samples)
        value = after(micro)
        before, last = before.to(value.dtype), last.to(value.dtype)
        rows = micro.mask.nonzero().squeeze(1)
        before[batch.rows(samples)[rows]] = value[rows - 1]
        last[samples] = value[micro.cu_seqlens[1:].long() - 1]
    return Values(before, last)


def _loss(value: Tensor, batch: Batch, rows: Tensor, row: ActorCritic) -> tuple[Tensor, Tensor]:
    """The value loss of the tokens `rows`, whose values are given, and its VALUE_SUMS."""
    assert batch.value is not None and batch.returns is not None, (
        "a batch without values is no batch of PPO's"
    )
    return value_loss(value, batch.value[rows], batch.returns[rows], batch.weight[rows], row.value_clip)


def _merge(rows: list[list[float]]) -> dict[str, float]:
    """The step's metrics from the VALUE_SUMS of every micro-batch of every process."""
    sums = (
        dict(zip(VALUE_SUMS, map(sum, zip(*rows, strict=True)), strict=True))
        if rows
        else dict.fromkeys(VALUE_SUMS, 0.0)
    )
    return {"vf_loss": sums["loss"], "num_tokens": sums["tokens"]} | ratios(CRITIC_METRICS, sums)


class CriticLearner(Learner):
    """Trains a `Critic` of its own; optimizer, schedule, clipping and master weights are `Learner`'s."""

    algorithm: ActorCritic

    def values(self, batch: Batch) -> Values:
        """The critic's values of the batch."""
        return values_of(lambda micro: self.model(micro.tokens, micro.cu_seqlens), batch, self.micro_tokens)

    def state(self) -> dict[str, Tensor]:
        """The weights too: the checkpoint's own folder is the policy's."""
        return super().state() | {
            f"weight.{n}": p.detach() for n, p in zip(self.names, self.weights, strict=True)
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[f"weight.{name}"])
        super().load_state(state)

    def _gradients(self, batch: Batch) -> dict[str, float]:
        rows: list[Tensor] = []
        with memory_limited_by("--micro-tokens", self.micro_tokens):
            for micro in micro_batches(batch, self.micro_tokens):
                live = micro.mask.nonzero().squeeze(1)
                loss, sums = _loss(
                    self.model(micro.tokens, micro.cu_seqlens)[live - 1], micro, live, self.algorithm
                )
                loss.backward()
                rows.append(sums)
        self.world.sum_gradients(self.masters)
        merged = _merge(self.world.gather(torch.stack(rows).tolist() if rows else []))
        return merged | {"loss": merged["vf_loss"]}


class PpoLearner(Learner):
    """Trains a policy and its critic: a row of CRITICS says which weights are the critic's, and whose
    optimizer moves them.
    """

    algorithm: ActorCritic

    def __init__(
        self,
        model: Any,
        algorithm: ActorCritic,
        optim: Optim,
        *,
        steps: int,
        micro_tokens: int,
        temperature: float = 1.0,
        world: World | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "steps": steps,
            "micro_tokens": micro_tokens,
            "temperature": temperature,
            "world": world,
        }
        self.kind = CRITICS[algorithm.critic]
        self.head = ValueHead(model.config.hidden_size, model.dtype, model.device) if self.kind.head else None
        critic = None
        if self.head is None:  # before the policy's weights get hooks that a copy would have too
            critic = (
                Critic.like(model)
                if algorithm.critic_model is None
                else Critic.load(algorithm.critic_model, model)
            )
        super().__init__(model, algorithm, optim, **options, beside=self.head)
        own = replace(optim, lr=optim.lr if algorithm.critic_lr is None else algorithm.critic_lr)
        self.critic = None if critic is None else CriticLearner(critic, algorithm, own, **options)
        # of the value loss, by micro-batch, where the policy's pass computes it
        self._sums: list[Tensor] = []

    def values(self, batch: Batch) -> Values:
        """The critic's values of the batch."""
        if self.critic is not None:
            return self.critic.values(batch)
        assert self.head is not None
        head = self.head
        return values_of(
            lambda micro: head(self.model(micro.tokens, micro.cu_seqlens)), batch, self.micro_tokens
        )

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step of the policy and of the critic; see `Learner.update`."""
        metrics = super().update(batch, step)
        if self.critic is None:
            return metrics
        told = self.critic.update(batch, step)
        return (
            metrics
            | _named(told)
            | {"critic_grad_norm": told["grad_norm"], "critic_lr": told["learning_rate"]}
        )

    def state(self) -> dict[str, Tensor]:
        """`Learner.state`, and the critic's weights and state under "critic."."""
        own = self.critic.state() if self.critic is not None else self._head_state()
        return super().state() | {f"critic.{name}": x for name, x in own.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.  Raises UserError for the state of another kind of critic."""
        own = {name.removeprefix("critic."): x for name, x in state.items() if name.startswith("critic.")}
        mine = (
            [f"weight.{n}" for n in self.critic.names] if self.critic is not None else [*self._head_state()]
        )
        if missing := [name for name in mine if name not in own]:
            kind = self.algorithm.critic
            raise UserError(
                f"--critic: expected {kind}'s {missing[0]} in the checkpoint; "
                "resume with the --critic that the run began with"
            )
        for name, x in self._head_state().items():
            x.copy_(own[name])
        super().load_state(state)
        if self.critic is not None:
            self.critic.load_state(own)

    def _head_state(self) -> dict[str, Tensor]:
        return {} if self.head is None else {name: p.detach() for name, p in self.head.named_parameters()}

    def _with_more(
        self, loss: Tensor, hidden: Tensor, at: Tensor | None, batch: Batch, rows: Tensor
    ) -> Tensor:
        if self.head is None or batch.value is None:
            return loss
        seen = hidden if at is None else hidden[at]
        value, sums = _loss(
            self.head(seen if self.kind.moves_policy else seen.detach()), batch, rows + 1, self.algorithm
        )
        self._sums.append(sums)
        return loss + self.algorithm.vf_coef * value

    def _gradients(self, batch: Batch) -> dict[str, float]:
        self._sums = []
        metrics = super()._gradients(batch)
        if self.head is None:
            return metrics | {"policy_loss": metrics["loss"]}
        merged = _named(_merge(self.world.gather(torch.stack(self._sums).tolist() if self._sums else [])))
        return (
            metrics | merged | {"policy_loss": metrics["loss"] - self.algorithm.vf_coef * merged["vf_loss"]}
        )


def _named(metrics: dict[str, float]) -> dict[str, float]:
    return {row.key: metrics[row.key] for row in CRITIC_METRICS if row.key in metrics}


@dataclass(frozen=True, slots=True)
class Kind:
    """Where the critic's hidden states come from.

    head          it is a head on the policy's, in the policy's optimizer; else a model of its own
    moves_policy  its loss trains the policy's weights too
    """

    head: bool
    moves_policy: bool


CRITICS = {"separate": Kind(False, False), "shared": Kind(True, True), "head": Kind(True, False)}
