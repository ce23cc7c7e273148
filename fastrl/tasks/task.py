"""What a task is: prompts, demonstrations, and an exact verifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]  # a chat message: "role", "content", and what else the chat template reads
Prompt = str | list[Message]
LogExtra = Callable[[str, list[str]], None]
LogMetric = Callable[[str, float], None]

TRAIN = "train"  # the split that is trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A problem.

    prompt   text, or a list of chat messages
    demo     a correct completion without its end-of-sequence token, or None when the task has none
    fields   what the verifier needs, JSON types only; reward functions get each field as a column
    """

    prompt: Prompt
    demo: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The verifier's verdict on one completion.

    well_formed  the completion has the form of an answer, right or wrong
    """

    reward: float
    correct: bool
    well_formed: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation with a task so far.

    said   what the policy wrote in each turn
    heard  what the task answered after each turn but the last
    """

    example: Example
    said: tuple[str, ...]
    heard: tuple[str, ...]


class Task(Protocol):
    """One task; a class with these members in a user's own file works like the built-in ones.

    Optional members:

    mistakes(example, count, index) -> list[str]   up to `count` wrong completions of example `index` of a
        split: gives preference pairs, with the demonstration as the chosen completion
    steps(example, completion) -> (texts, right)   the parts of a completion, and for each part whether
        everything is right up to its end: gives process rewards
    answer(completion)                             what a completion comes down to, None for nothing: lets
        samples vote
    note(split) -> str                             a line for the log on what the split is, if anything
    """

    @property
    def name(self) -> str:
        """Shown in reports and metric names."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a completion, besides the end-of-sequence token."""

    def size(self, split: str) -> int:
        """Number of examples in `split`.  Raises UserError for a split that the task does not have."""

    def example(self, split: str, index: int) -> Example:
        """Example `index` in [0, size(split)) of `split`: a pure function of the task's options and these
        two.
        """

    def verify(self, example: Example, completion: str) -> Score:
        """The score of `completion`.  Total: never raises, whatever the text, in bounded time."""

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The task's own tokenizer, or None when any model's tokenizer will do."""


@runtime_checkable
class Conversation(Protocol):
    """What a task of several turns has besides the members of `Task`."""

    def step(
        self, transcripts: Sequence[Transcript]
    ) -> tuple[Sequence[str], Sequence[float], Sequence[bool]]:
        """(observations, rewards, done), one each per conversation in which the policy just ended a turn.

        A sequence's reward is the sum over its turns.  `verify` later sees the whole conversation after the
        prompt.  Reward functions see messages, the observations as those of a user; a task may have an
        attribute `role` that names another ("tool").
        """


def is_conversation(task: object) -> TypeGuard[Conversation]:
    """Whether a task is one of several turns."""
    return callable(getattr(task, "step", None))


def notes(task: Task, split: str) -> list[str]:
    """What the task wants said of a split: a line, or nothing."""
    note = getattr(task, "note", None)
    said = note(split) if callable(note) else ""
    return [str(said)] if said else []


def whole_text(said: Prompt) -> str:
    """A completion's text; of messages, their contents end to end, which of a conversation is all that
    follows its prompt.
    """
    return said if isinstance(said, str) else "".join(str(m["content"]) for m in said)


def draw(*parts: object) -> int:
    """A pseudo-random number in [0, 2^64), a function of `parts` alone.

    Unlike hash(), it is the same in every process and Python version.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def assign_split(shares: Mapping[str, float], *key: object) -> str:
    """The split that content `key` belongs to, the same in every run and for every seed.

    `shares` holds the splits' fractions, which sum to 1.
    """
    position = draw("split", *key) / 2**64
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return name


def task_reward(task: Task) -> Callable[..., list[float]]:
    """The task's verifier as a reward function (see fastrl.rewards.functions), named after the task.

    It reads the column `example`.
    """

    def verify(
        completions: Sequence[Prompt],
        example: Sequence[Example],
        log_extra: LogExtra,
        log_metric: LogMetric,
    ) -> list[float]:
        scores = []
        for problem, completion in zip(example, completions, strict=True):
            scores.append(task.verify(problem, whole_text(completion)))

        log_extra("message", [s.message for s in scores])
        for name in ("correct", "well_formed"):
            log_metric(name, sum(getattr(s, name) for s in scores) / max(len(scores), 1))
        return [s.reward for s in scores]

    verify.__name__ = task.name
    return verify
