"""A task of several turns as the sampler's environment: tokens on one side, transcripts on the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastrl.errors import UserError
from fastrl.files import call_user
from fastrl.sampler import Turn
from fastrl.tasks.task import Transcript

if TYPE_CHECKING:
    from fastrl.tasks import Conversation, Example


class Dialogue:
    """One call's conversations; sequence i is about examples[i].

    rewards  (S,) the sum of what the task gave for each sequence's turns so far
    """

    def __init__(self, task: Conversation, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.task, self.tokenizer, self.examples = task, tokenizer, examples
        self.rewards = [0.0] * len(examples)

    def __call__(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        """The task's observations as tokens, None where a conversation is over."""
        transcripts = [self._transcript(turn) for turn in turns]
        name = getattr(self.task, "name", type(self.task).__name__)
        answer = call_user(f"--task: {name}'s step", self.task.step, transcripts)
        if (
            not isinstance(answer, tuple)
            or len(answer) != 3
            or {len(part) for part in answer} != {len(turns)}
        ):
            raise UserError(
                f"--task: {name}'s step: expected observations, "
                f"rewards and done for {len(turns)} transcripts, got {answer!r}"
            )
        observations, rewards, done = answer
        for turn, reward in zip(turns, rewards, strict=True):
            self.rewards[turn.index] += float(reward)
        return [None if over else self._encode(text) for text, over in zip(observations, done, strict=True)]

    def _transcript(self, turn: Turn) -> Transcript:
        """The sequence cut where the speaker changes."""
        parts = [
            (chosen, self.tokenizer.decode([t for t, _ in run], skip_special_tokens=True))
            for chosen, run in (
                (key, list(run))
                for key, run in groupby(zip(turn.tokens, turn.chosen, strict=True), key=lambda x: x[1])
            )
        ]
        said, heard = (tuple(text for chosen, text in parts if chosen == who) for who in (True, False))
        return Transcript(self.examples[turn.index], said, heard)

    def _encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise UserError(
                "--task: step: expected an observation of at least one token where a conversation "
                "goes on, got none"
            )
        return tokens


def dialogue(task: Any, tokenizer: Any, examples: Sequence[Example]) -> Dialogue | None:
    """The environment of one call for a task of several turns (`fastrl.tasks.Conversation`); None for any
    other.
    """
    return Dialogue(task, tokenizer, examples) if hasattr(task, "step") else None
