"""One optimizer step: the gradient of an objective over a batch, then AdamW.

A `Learner` is final.  The objective (objective.py) defines the loss, `MasterWeights` (optimizer.py) how the
weights move.  A method that trains two models holds two learners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor

from fastrl.parallel.device import memory_limited_by
from fastrl.parallel.world import World
from fastrl.train.objective import Objective, P, PartNumbers
from fastrl.train.optimizer import MasterWeights
from fastrl.train.source import B, Metrics, State

B_contra = TypeVar("B_contra", contravariant=True)
Companions = Mapping[str, tuple[Any, Any]]  # folder inside a checkpoint -> (model, its tokenizer)


class Trainable(Protocol[B_contra]):
    """What the trainer's loop asks of whatever is trained."""

    def update(self, batch: B_contra, step: int) -> Metrics:
        """Take one optimizer step on a batch.  `step` is the training step, from 0, which may have several
        updates; all of them use its learning rate.
        """

    def companions(self) -> Companions:
        """Models trained beside the policy.  A checkpoint saves each in a folder of its own, and a resumed
        run reads it from there.
        """

    def state(self) -> State:
        """Everything but the policy's weights that the next step depends on, by name."""

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""


def accumulate(
    loss_of: Callable[[P], tuple[Tensor, Tensor]], parts: Iterable[P], micro_tokens: int
) -> list[Tensor]:
    """Add the gradient of this process's parts to the masters; returns each part's numbers, on their way."""
    numbers: list[Tensor] = []
    with memory_limited_by("--micro-tokens", micro_tokens):
        for part in parts:
            loss, row = loss_of(part)
            loss.backward()
            numbers.append(row)
    return numbers


def as_rows(numbers: list[Tensor]) -> PartNumbers:
    """Vectors as lists of floats, with one wait for the device."""
    if not numbers:
        return []
    flat = iter(torch.cat([row.double() for row in numbers]).tolist())
    return [[next(flat) for _ in range(row.numel())] for row in numbers]


def gradients(
    objective: Objective[B, Any], batch: B, weights: MasterWeights, world: World, micro_tokens: int
) -> tuple[Metrics, float]:
    """Leave the whole step's gradient, all processes included, in the masters; returns the step's metrics,
    and the gradient's L2 norm.

    The host waits for the device once, when all is computed.
    """
    numbers = accumulate(objective.loss, objective.split(batch, micro_tokens), micro_tokens)
    world.sum_gradients(weights.masters)
    *rows, (norm,) = as_rows([*numbers, weights.norm()])
    return objective.metrics(world.gather(rows)), norm


Gradients = Callable[[Any, Any, MasterWeights, World, int], tuple[Metrics, float]]  # see `gradients`


@final
class Learner(Generic[B]):
    """Minimises an objective: one `update` is one optimizer step over a whole batch.

    gradients  how the gradient of a batch is made; the default suits every objective of one term
    """

    def __init__(
        self,
        objective: Objective[B, Any],
        weights: MasterWeights,
        world: World,
        micro_tokens: int,
        gradients: Gradients = gradients,
    ) -> None:
        self.objective, self.weights, self.world = objective, weights, world
        self.micro_tokens, self.gradients = micro_tokens, gradients

    def update(self, batch: B, step: int) -> Metrics:
        """Take one optimizer step on `batch`; `step` is the training step, from 0, and sets the learning
        rate.

        Raises:  NotFinite, before any weight is touched, when the loss or the gradient is not finite;
                 UserError when memory runs out.
        """
        try:
            given = (self.objective, batch, self.weights, self.world, self.micro_tokens)
            metrics, norm = self.gradients(*given)
            # No loss token is left: AdamW must not step on its momentum alone.
            if metrics["num_tokens"] == 0:
                lr = self.weights.learning_rate(step)
                return metrics | {"grad_norm": 0.0, "learning_rate": lr}
            taken = self.weights.step(step, metrics["loss"], norm)
        finally:
            self.weights.clear()

        self.weights.publish()
        return metrics | taken

    def companions(self) -> Companions:
        """None: the policy is all that is trained."""
        return {}

    def state(self) -> State:
        """Everything but the weights that the next step depends on, by name."""
        return self.weights.state()

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""
        self.weights.load_state(state)
