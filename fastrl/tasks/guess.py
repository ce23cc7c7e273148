"""Guess a number: the smallest task of several turns.  After each guess the game says whether the number is
larger or smaller.

prompt  0-31:      policy  16?   game  >   policy  24?   game  <   policy  20?   (and so on, until it is
        right)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastrl.errors import UserError
from fastrl.tasks.task import Example, Score, Transcript, draw
from fastrl.tasks.tokens import char_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
GUESS = re.compile(r"([0-9]{1,4})\?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """Numbers from 0 to `numbers` - 1, at most `turns` guesses; the reward is 1 for the right one, less
    `price` for each before it.
    """

    numbers: int = 32
    turns: int = 6
    price: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "guess"
    stop: ClassVar[tuple[str, ...]] = ("?",)

    def __post_init__(self) -> None:
        for option, value, fine in (
            ("numbers", self.numbers, 2 <= self.numbers <= 10_000),
            ("turns", self.turns, self.turns >= 1),
        ):
            if not fine:
                expected = "2 to 10000" if option == "numbers" else "at least 1"
                raise UserError(f"guess: {option}: expected {expected}, got {value}")

    def size(self, split: str) -> int:
        """1000 games in train, 200 in each other split.  Raises UserError for a split that is unknown."""
        if split not in SPLITS:
            raise UserError(f"guess: expected a split of {', '.join(SPLITS)}; got {split!r}")
        return 1000 if split == "train" else 200

    def example(self, split: str, index: int) -> Example:
        """Game `index` of `split`: the same prompt everywhere, and a number that only the game knows."""
        if not 0 <= index < self.size(split):
            raise IndexError(
                f"index: expected 0 <= index < {self.size(split)}, the size of {split!r}; got {index}"
            )
        number = draw(self.seed, "guess", split, index) % self.numbers
        return Example(prompt=f"0-{self.numbers - 1}:", demo=f"{number}?", fields={"number": number})

    def step(self, transcripts: Sequence[Transcript]) -> tuple[list[str], list[float], list[bool]]:
        """What the game says to each last guess, its reward, and whether the game is over."""
        said = [self._answer(t) for t in transcripts]
        return [text for text, _, _ in said], [reward for _, reward, _ in said], [done for _, _, done in said]

    def verify(self, example: Example, completion: str) -> Score:
        """1 when the last guess of the whole game is right, within the turns allowed.  Total."""
        guesses = GUESS.findall(completion)
        right = bool(guesses) and len(guesses) <= self.turns and int(guesses[-1]) == example.fields["number"]
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
        number, guess = transcript.example.fields["number"], GUESS.fullmatch(transcript.said[-1])
        turn = len(transcript.said)
        if guess is None:
            return "", 0.0, True
        if int(guess[1]) == number:
            return "", 1.0 - self.price * (turn - 1), True
        return (">" if number > int(guess[1]) else "<"), 0.0, turn >= self.turns
