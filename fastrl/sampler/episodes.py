"""A task of several turns as the sampler's environment: tokens on one side, transcripts on the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from fastrl.batch.types import Rollouts
from fastrl.batch.types import Turn as Run
from fastrl.data.encode import continuations
from fastrl.errors import UserError
from fastrl.files import call_user, location
from fastrl.model.language import Tokenizer
from fastrl.sampler.turns import Turn
from fastrl.tasks.checked import turns as returned_turns
from fastrl.tasks.task import Transcript, is_conversation

if TYPE_CHECKING:
    from fastrl.tasks import Conversation, Example


class Dialogue:
    """One call's episodes; sequence i is about examples[i].

    rewards  (S,) the sum of the task's rewards for each sequence's turns so far
    """

    def __init__(self, task: Conversation, tokenizer: Tokenizer | None, examples: Sequence[Example]) -> None:
        if tokenizer is None:
            raise UserError("--tokenizer: a task of several turns reads text, and the run has no tokenizer")
        self.task, self.tokenizer, self.examples = task, tokenizer, examples
        self.rewards = [0.0] * len(examples)

    def __call__(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        """The task's observations as tokens, None where an episode is over."""
        transcripts = [self._transcript(turn) for turn in turns]
        name = getattr(self.task, "name", type(self.task).__name__)
        answer = call_user(f"--task: {name}'s step", self.task.step, transcripts)
        checked = returned_turns(answer, len(turns))
        if isinstance(checked, str):
            raise UserError(f"--task: {name}'s step{location(self.task.step)}: {checked}")

        observations, rewards, done = checked
        for turn, reward in zip(turns, rewards, strict=True):
            self.rewards[turn.index] += reward
        return [None if over else self._encode(text) for text, over in zip(observations, done, strict=True)]

    def messages(self, rollouts: Rollouts) -> list[list[dict[str, str]]]:
        """Each conversation after its prompt as chat messages: the policy's turns are the assistant's, the
        task's answers the user's, or of the role that the task names (`role = "tool"`).

        Their contents, joined, are the conversation's text.  A sequence without any token is one empty
        message of the assistant.
        """
        role: str = getattr(self.task, "role", "user")
        found = []
        for turns in rollouts.turns():
            runs = turns or [Run(True, [])]
            texts = self._contents([run.tokens for run in runs])
            speakers = ["assistant" if run.own else role for run in runs]
            pairs = zip(speakers, texts, strict=True)
            found.append([{"role": speaker, "content": text} for speaker, text in pairs])
        return found

    def _contents(self, runs: Sequence[Sequence[int]]) -> list[str]:
        """The text that each run of tokens adds to those before it: some tokenizers write a word's space only
        where something is in front of it.
        """
        tokens: list[int] = []
        ends = [0]
        for run in runs:
            tokens += run
            ends.append(len(tokens))
        prefixes = [self.tokenizer.decode(tokens[:end], skip_special_tokens=True) for end in ends[1:]]
        if all(after.startswith(before) for before, after in pairwise(prefixes)):
            return [after.removeprefix(before) for before, after in pairwise(["", *prefixes])]
        return [self.tokenizer.decode(list(run), skip_special_tokens=True) for run in runs]

    def _transcript(self, turn: Turn) -> Transcript:
        """The sequence cut where the speaker changes."""
        replies: list[str] = []
        observations: list[str] = []
        pairs = zip(turn.chosen, turn.tokens, strict=True)
        for chosen, run in groupby(pairs, key=itemgetter(0)):
            text = self.tokenizer.decode([token for _, token in run], skip_special_tokens=True)
            (replies if chosen else observations).append(text)
        return Transcript(self.examples[turn.index], tuple(replies), tuple(observations))

    def _encode(self, text: str) -> list[int]:
        (tokens,) = continuations([(text, "--task: step")], self.tokenizer)
        if not tokens:
            raise UserError(
                "--task: step: expected an observation of at least one token where an episode "
                "goes on, got none"
            )
        return tokens


def dialogue(task: object, tokenizer: Tokenizer | None, examples: Sequence[Example]) -> Dialogue | None:
    """The environment of one call for a task of several turns (`fastrl.tasks.Conversation`); None for any
    other task.
    """
    if not is_conversation(task):
        return None
    return Dialogue(task, tokenizer, examples)
