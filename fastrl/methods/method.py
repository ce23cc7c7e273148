"""What a training command is: a row that says how options become an algorithm, a learner and its data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastrl import ops
from fastrl.batch.types import Batch
from fastrl.config import Run, Sampling
from fastrl.data.dataset import Items
from fastrl.model.adapter import load_model
from fastrl.model.language import LanguageModel, Tokenizer
from fastrl.model.tokenizer import load_tokenizer
from fastrl.parallel.world import World
from fastrl.report.metric import Metric
from fastrl.sampler import Sampler
from fastrl.tasks import Task
from fastrl.train.learner import Gradients, Learner, Trainable, gradients
from fastrl.train.objective import Objective, batch_logp
from fastrl.train.optimizer import MasterWeights
from fastrl.train.source import B, Source

C = TypeVar("C", bound=Run)  # a command's options
A = TypeVar("A")  # its kind of algorithm
M = TypeVar("M")  # the model it trains


class Parametrised(Protocol):
    """A module, or a language model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, with its name."""


class Amount(NamedTuple):
    """How much there is to train on: items of which a step takes --prompts, and their tokens if known."""

    items: int
    what: str
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Context(Generic[C, A, M]):
    """What a run has before its learner and its source exist.

    data  what there is to train on: sources tell
    """

    config: C
    algorithm: A
    model: M
    tokenizer: Tokenizer
    task: Task | None
    sampler: Sampler
    sampling: Sampling
    device: torch.device
    world: World
    data: list[Amount] = field(default_factory=list)

    def tell(self, items: object, count: int, what: str) -> None:
        """Note how much there is; the tokens of a dataset's `items` are counted already."""
        tokens = items.size.tokens if isinstance(items, Items) else None
        self.data.append(Amount(count, what, tokens))

    @property
    def temperature(self) -> float:
        """Divides the logits, in sampling and in the loss."""
        return self.sampling.temperature

    def weights(
        self, model: Parametrised, *, lr: float | None = None, head: nn.Module | None = None
    ) -> MasterWeights:
        """A model's parameters, and those of a head trained with it, under the run's optimizer.

        lr  peak learning rate, where it is not the run's
        """
        optim = self.config.optim if lr is None else replace(self.config.optim, lr=lr)
        named = list(model.named_parameters())
        if head is not None:
            named += head.named_parameters("beside")  # apart from the model's names in a checkpoint
        return MasterWeights(named, optim, steps=self.config.steps)

    def learner(
        self, objective: Objective[B, Any], weights: MasterWeights, gradients: Gradients = gradients
    ) -> Learner[B]:
        """A learner under the run's token budget."""
        return Learner(objective, weights, self.world, self.config.micro_tokens, gradients)

    def logp(self, model: LanguageModel, batch: Batch) -> Tensor:
        """(T,) log-probs of the batch's loss tokens under a model, nats, at the run's temperature."""
        return batch_logp(model, batch, micro_tokens=self.config.micro_tokens, temperature=self.temperature)

    def reference_model(self) -> LanguageModel:
        """A frozen copy of the weights that the run began with (config.model), also after a resume.  Each
        call loads it anew.
        """
        config, model = self.config, self.sampler.model
        frozen = load_model(
            config.model,
            dtype=model.dtype,
            device=self.device,
            seed=config.seed,
            trust=config.trust_remote_code,
        )
        return frozen.requires_grad_(False)


@dataclass(frozen=True)
class Origin(Generic[C, A]):
    """Where a run's model comes from.

    folder  what to load: the checkpoint of a resumed run, else config.model (weights, or a config.json for
            random ones)
    """

    config: C
    algorithm: A
    folder: str
    dtype: torch.dtype
    device: torch.device
    task: Task | None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the options name, the folder's, or the task's own."""
        own = None if self.task is None else self.task.tokenizer
        config = self.config
        return load_tokenizer(
            config.tokenizer,
            self.folder,
            own,
            template=config.chat_template,
            trust=config.trust_remote_code,
        )


def language_model(origin: Origin[Any, Any]) -> LanguageModel:
    """A causal language model."""
    config = origin.config
    return load_model(
        origin.folder,
        dtype=origin.dtype,
        device=origin.device,
        seed=config.seed,
        trust=config.trust_remote_code,
    )


def unsampled(config: Run) -> tuple[str, Sampling]:
    """A method without rollouts samples for evaluation alone: our own sampler, with its defaults."""
    return "fastrl", Sampling()


@dataclass(frozen=True, slots=True)
class Method(Generic[C, A, M]):
    """One training command.

    choose    options -> the algorithm they ask for; refuses options that do not go together
    load      where the model comes from -> the model that is trained
    learner   what trains, and what its optimizers hold
    source    where its batches come from, and the longest completion to expect, tokens
    metrics   what the command logs; any other number the learner returns is dropped
    sampling  options -> a row of SAMPLERS, and its settings
    held_out  whether the source evaluates on data of its own that it holds out (see train.source.Evaluable)
    """

    choose: Callable[[C], A]
    load: Callable[[Origin[C, A]], M]
    learner: Callable[[Context[C, A, M]], Trainable[Any]]
    source: Callable[[Context[C, A, M], Any], tuple[Source[Any], int]]
    metrics: tuple[Metric, ...]
    sampling: Callable[[C], tuple[str, Sampling]] = unsampled
    held_out: bool = False


# For code that serves every command, such as the trainer.
AnyMethod: TypeAlias = Method[Any, Any, Any]
AnyContext: TypeAlias = Context[Any, Any, Any]


def arithmetic(config: Run) -> contextlib.AbstractContextManager[None]:
    """What rollouts and learner compute under: exact mode, for a run that asks for it."""
    return ops.exact() if config.exact else contextlib.nullcontext()
