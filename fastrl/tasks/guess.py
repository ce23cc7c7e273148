"""Guess a number: the smallest task of several turns.

After each guess the game says whether the number is larger (>) or smaller (<), until the guess is right:

    prompt  0-31:      policy  16?   game  >   policy  24?   game  <   policy  20?   ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastrl.errors import UserError, require
from fastrl.tasks.task import Example, Score, Transcript, draw
from fastrl.tasks.tokens import char_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
GUESS = re.compile(r"([0-9]{1,4})\?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """Guess a number from 0 to `numbers` - 1 in at most `turns` turns.

    The reward is 1 for the right guess, less `price` for each guess before it.
    """

    numbers: int = 32
    turns: int = 6
    price: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "guess"
    stop: ClassVar[tuple[str, ...]] = ("?",)

    def __post_init__(self) -> None:
        require(
            "guess: numbers",
            self.numbers,
            2 <= self.numbers <= 10_000,
            "2 to 10000",
        )
        require(
            "guess: turns",
            self.turns,
            self.turns >= 1,
            "at least 1",
        )

    def size(self, split: str) -> int:
        """1000 games in train, 200 in each other split.  Raises UserError for an unknown split."""
        if split not in SPLITS:
            raise UserError(f"guess: expected a split of {', '.join(SPLITS)}; got {split!r}")
        return 1000 if split == "train" else 200

    def example(self, split: str, index: int) -> Example:
        """Game `index` of `split`: every game has the same prompt, only the hidden number differs."""
        size = self.size(split)
        if not 0 <= index < size:
            raise IndexError(f"index: expected 0 <= index < {size}, the size of {split!r}; got {index}")
        number = draw(self.seed, "guess", split, index) % self.numbers
        return Example(
            prompt=f"0-{self.numbers - 1}:",
            demo=f"{number}?",
            fields={"number": number},
        )

    def step(self, transcripts: Sequence[Transcript]) -> tuple[list[str], list[float], list[bool]]:
        """The game's answer to each last guess, its reward, and whether the game is over."""
        observations = []
        rewards = []
        done = []
        for transcript in transcripts:
            text, reward, over = self._answer(transcript)
            observations.append(text)
            rewards.append(reward)
            done.append(over)
        return observations, rewards, done

    def verify(self, example: Example, completion: str) -> Score:
        """1 when the last guess of the whole game is right, within the turns allowed.  Total."""
        guesses = GUESS.findall(completion)
        in_time = 1 <= len(guesses) <= self.turns
        right = in_time and int(guesses[-1]) == example.fields["number"]
        rest = GUESS.sub("", completion)
        return Score(
            reward=float(right),
            correct=right,
            well_formed=bool(guesses) and not rest.strip("<>"),
            message=f"{len(guesses)} guesses",
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character of the game."""
        return char_tokenizer("0123456789-:?<>")

    def _answer(self, transcript: Transcript) -> tuple[str, float, bool]:
        number = transcript.example.fields["number"]
        turn = len(transcript.said)
        match = GUESS.fullmatch(transcript.said[-1])
        if match is None:
            return "", 0.0, True

        guess = int(match[1])
        if guess == number:
            return "", 1.0 - self.price * (turn - 1), True
        return (">" if number > guess else "<"), 0.0, turn >= self.turns
