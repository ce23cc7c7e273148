"""Where a training step's data comes from: the protocol of a source, and the order in which items are drawn.

What a source draws depends on the step's number, the weights, and the state that it keeps in the checkpoint
(unfinished groups under --tail carry) alone: prompts come from a seeded permutation, and sampling noise is
keyed by the sequence's number.  A resumed run therefore sees what an uninterrupted one would have seen, and R
processes see what one would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

B = TypeVar("B")  # one optimizer step's batch
Metrics = dict[str, float]
LoggedSample = dict[str, object]  # a line of samples.jsonl
State = dict[str, Tensor]  # what a checkpoint keeps, by name


def order(n: int, seed: int, first: int, count: int) -> list[int]:
    """Items [first, first + count) of an endless sequence of seeded permutations of range(n)."""
    items: list[int] = []
    while len(items) < count:
        epoch, start = divmod(first + len(items), n)
        items += _permutation(n, seed, epoch)[start : start + count - len(items)].tolist()
    return items


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch (n,); kept from step to step, for it takes 20 ms to make for a million items."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


@dataclass(frozen=True, slots=True)
class Step(Generic[B]):
    """One training step's data.

    batches  one for each optimizer step
    metrics  what is known of the data before it is trained on
    samples  a few completions worth keeping, as samples.jsonl has them
    """

    batches: list[B]
    metrics: Metrics = field(default_factory=dict)
    samples: list[LoggedSample] = field(default_factory=list)


class Source(Protocol[B]):
    """What the trainer asks for data."""

    def collect(self, step: int, version: int) -> Step[B]:
        """The data of `step` (counted from 0); the weights have seen `version` optimizer steps."""

    def state(self) -> State:
        """What a checkpoint keeps: data that is neither used yet nor a function of the step's number."""

    def load_state(self, state: State) -> None:
        """Restore what `state` returned."""


@runtime_checkable
class Evaluable(Protocol):
    """A source that holds some of its data out and evaluates on it."""

    def evaluate(self) -> tuple[Metrics, dict[str, object], list[LoggedSample]]:
        """Metrics of the held-out data, under eval/; a table for the report; a few samples."""
