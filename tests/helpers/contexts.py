"""A method's context without a run around it."""

from __future__ import annotations

from typing import Any

from runs import tokenizer

from fastrl.config import Run, Sampling
from fastrl.methods.method import Context
from fastrl.parallel.world import World
from fastrl.sampler import Sampler


def context_of(
    config: Run, algorithm: Any, model: Any, *, world: World | None = None, temperature: float = 1.0
) -> Context[Any, Any, Any]:
    """The context of a configuration with a model that is there already, the card game's tokenizer and no
    task.
    """
    words = tokenizer()
    return Context(
        config=config,
        algorithm=algorithm,
        model=model,
        tokenizer=words,
        task=None,
        sampler=Sampler(model, words),
        sampling=Sampling(temperature=temperature),
        device=model.device,
        world=world or World(),
    )
