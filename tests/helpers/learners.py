"""Learners of any objective, without a run around them and without the command line's packages."""

from __future__ import annotations

from typing import Any

from fastrl.config import Optim
from fastrl.parallel.world import World
from fastrl.train.learner import Learner
from fastrl.train.optimizer import MasterWeights


def learner_of(
    objective: Any,
    model: Any,
    micro_tokens: int = 10**6,
    optim: Optim | None = None,
    world: World | None = None,
    steps: int = 10,
    **named: Any,
) -> Learner[Any]:
    """A learner of any objective, of a model's parameters."""
    weights = MasterWeights(model.named_parameters(), optim or Optim(), steps=steps)
    return Learner(objective, weights, world or World(), micro_tokens, **named)


def leave_gradient(trained: Learner[Any], batch: Any) -> dict[str, float]:
    """Leave a batch's whole gradient in the masters; the step's metrics."""
    given = (trained.objective, batch, trained.weights, trained.world, trained.micro_tokens)
    return trained.gradients(*given)[0]
