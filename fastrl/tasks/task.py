"""What a task is: prompts, demonstrations, and an exact verifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fastrl.batch.types import Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A problem.

    prompt   text, or a list of chat messages
    demo     a right completion without its end-of-sequence token, or None when the task knows none
    fields   what the verifier needs, JSON types only; reward functions get it as a column
    """

    prompt: Prompt
    demo: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the verifier says of one completion: `well_formed` means it has the form of an answer, right or
    wrong.
    """

    reward: float
    correct: bool
    well_formed: bool
    message: str = ""


class Task(Protocol):
    """One task; a class with these members in a user's own file is as good as the built-in ones.

    One that also has `mistakes(example, count, index) -> list[str]`, up to `count` wrong completions of
    example `index` of a split, gives preference pairs: the demonstration is the chosen one.  One that has
    `steps(example, completion) -> (texts, right)` as well, the parts of a completion and whether all is right
    up to the end of each, gives process rewards.  With `answer(completion)`, what a completion comes down to
    (None for nothing), samples can vote.
    """

    @property
    def name(self) -> str:
        """Shown in reports and metric names."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a completion, beside the end-of-sequence token."""

    def size(self, split: str) -> int:
        """How many examples `split` has.  Raises UserError for a split the task does not have."""

    def example(self, split: str, index: int) -> Example:
        """Example `index` in [0, size(split)) of `split`: a pure function of the task's options and these
        two.
        """

    def verify(self, example: Example, completion: str) -> Score:
        """The score of `completion`.  Total: never raises, whatever the text, in bounded time."""

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The task's own tokenizer, or None when it is at home in any."""


@runtime_checkable
class Conversation(Protocol):
    """What a task of several turns has beside the members of `Task`."""

    def step(
        self, transcripts: Sequence[Transcript]
    ) -> tuple[Sequence[str], Sequence[float], Sequence[bool]]:
        """Observations, rewards and whether it is over, one each for conversations whose policy has just
        ended a turn with a stop.

        A sequence's reward is the sum over its turns.  `verify` then sees the whole conversation after the
        prompt.
        """


def draw(*parts: object) -> int:
    """A number in [0, 2^64) that depends on `parts` alone: the same in every process and Python version,
    unlike hash().
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def bucket(shares: dict[str, float], *key: object) -> str:
    """The name in `shares` (fractions that sum to 1) that content `key` belongs to; every run and seed agree
    on it.
    """
    place = draw("split", *key) / 2**64
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return name


def task_reward(task: Task) -> Callable[..., list[float]]:
    """The task's verifier as a reward function (see fastrl.rewards.functions), named after the task; it reads
    the column `example`.
    """

    def verify(
        completions: Sequence[Any], example: Sequence[Example], log_extra: Any, log_metric: Any
    ) -> list[float]:
        said = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        scores = [task.verify(e, text) for e, text in zip(example, said, strict=True)]
        log_extra("message", [s.message for s in scores])
        for name in ("correct", "well_formed"):
            log_metric(name, sum(getattr(s, name) for s in scores) / max(len(scores), 1))
        return [s.reward for s in scores]

    verify.__name__ = task.name
    return verify
