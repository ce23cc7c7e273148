"""The k-card arithmetic game (GeneralPoints, arXiv 2501.17161), generated without end from a seed and
verified exactly.

    prompt      a:7K3>18|                 rule, cards, target          (with filler=4: #x1y2a:7K3>18|)
    completion  7,13,3;13-7=6;6*3=18      the cards' numbers, then k-1 steps over a pool

Under rule a the face cards J, Q, K count 10; under rule b 11, 12, 13.  A problem is (rule, sorted numbers,
target), and the splits are made by (sorted numbers, target): under rule a many hands are the same numbers, so
a split by cards leaks.

    train, val, test   the rules trained on; val and test problems are in no training set, whatever its rules
                       and seed
    ood_rule           test problems under the other rule, with a face card, so that the rules differ
    perturbed          the test prompts with their cards in another order, other cards of the same number,
                       other filler
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerFast

from fastrl.errors import UserError
from fastrl.tasks.cards.mistakes import mistakes
from fastrl.tasks.cards.rules import RANKS, RULES, hands, number_sets, reachable, solutions, translate, write
from fastrl.tasks.cards.verifier import Level, check, judge_steps
from fastrl.tasks.task import Example, Score, bucket, draw
from fastrl.tasks.tokens import char_tokenizer

SPLITS = ("train", "val", "test", "ood_rule", "perturbed")
REWARDS = {  # one reward per Level: ill-formed, wrong numbers, wrong steps, correct
    "binary": (0.0, 0.0, 0.0, 1.0),
    "ladder": (0.0, 0.05, 0.1, 1.0),
}
FILLER = "".join(dict.fromkeys("0123456789" + RANKS))
ALPHABET = "".join(dict.fromkeys(FILLER + "".join(RULES) + "#:>|,;=+-*/"))


class Problem(NamedTuple):
    """What the splits are made of; numbers (sorted) and target together stand in one split only."""

    rule: str
    numbers: tuple[int, ...]
    target: int


class Deck(NamedTuple):
    """The problems of a split, dealt in rounds: each round, one more hand of every problem that has a turn
    left.
    """

    problems: tuple[Problem, ...]
    # how many rounds each problem is dealt in: its distinct hands, or `repeats` in train
    turns: tuple[int, ...]
    starts: tuple[int, ...]  # index of the first example of every round, and the size at the end
    faces: bool  # every hand holds a face card


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The task; every option is part of what `example` is a pure function of."""

    name: ClassVar[str] = "cards"
    stop: ClassVar[tuple[str, ...]] = ()

    k: int = 3
    """Cards in a hand, 2 to 4."""
    targets: tuple[int, int] = (1, 40)
    """Lowest and highest target."""
    rules: str = "a"
    """Rules trained on: a, b or ab."""
    fractions: bool = False
    """Whether steps may pass through fractions; otherwise every result is an integer of at least 0."""
    limit: int | None = 99
    """Largest result in a demonstration (None: any).  The verifier takes any exact result."""
    filler: int = 0
    """Random characters before the prompt, which mean nothing."""
    reward: str = "binary"
    """A row of REWARDS."""
    val: float = 0.05
    """Share of the problems in the validation split."""
    test: float = 0.15
    """Share of the problems in the test split, and in those made from it."""
    repeats: int = 64
    """Rounds of the training split: each deals every problem once more,
    with another hand and demonstration.
    """
    seed: int = 0
    """Orders, hands, demonstrations and filler; not which problem is in which split."""

    def __post_init__(self) -> None:
        pair = len(self.targets) == 2 and all(isinstance(end, int) for end in self.targets)
        low, high = self.targets if pair else (0, 0)
        shares = self.val >= 0 and self.test >= 0 and self.val + self.test < 1
        for good, message in (
            (2 <= self.k <= 4, f"k: expected 2, 3 or 4 cards, got {self.k}"),
            (1 <= low <= high, f"targets: expected two numbers, 1 <= low <= high, got {self.targets}"),
            (self.rules in ("a", "b", "ab"), f"rules: expected a, b or ab, got {self.rules!r}"),
            (
                self.limit is None or self.limit >= high,
                f"limit: expected at least the highest target {high}, got {self.limit}",
            ),
            (0 <= self.filler <= 64, f"filler: expected 0 to 64 characters, got {self.filler}"),
            (self.reward in REWARDS, f"reward: expected one of {', '.join(REWARDS)}; got {self.reward!r}"),
            (
                shares,
                "val, test: expected shares that leave something to train on, "
                f"got {self.val} and {self.test}",
            ),
            (self.repeats >= 1, f"repeats: expected at least 1, got {self.repeats}"),
        ):
            if not good:
                raise UserError(f"cards: {message}")

    def size(self, split: str) -> int:
        """Distinct prompts in `split`; in train `repeats` hands per problem.  Raises UserError for a split
        that is unknown or empty.
        """
        return self._deck(split).starts[-1]

    def example(self, split: str, index: int) -> Example:
        """Example `index` of `split`; consecutive ones are different problems until each was dealt once.

        Raises UserError for an unknown split, IndexError for an index outside [0, size(split)).
        """
        deck = self._deck(split)
        if not 0 <= index < deck.starts[-1]:
            raise IndexError(
                f"index: expected 0 <= index < {deck.starts[-1]}, the size of {split!r}; got {index}"
            )
        dealt = "test" if split == "perturbed" else split
        turn = bisect_right(deck.starts, index) - 1
        place = _round(self, dealt, turn)[index - deck.starts[turn]]
        problem = deck.problems[place]
        every = hands(problem.numbers, problem.rule, deck.faces)
        hand = every[(draw(self.seed, dealt, problem) + turn) % len(every)]
        if split == "perturbed":
            hand = self._same_numbers(hand, problem, index)
        return self._example(problem, hand, split, index)

    def verify(self, example: Example, completion: str) -> Score:
        """1 (under the binary reward) for a correct answer to exactly these cards, read by
        `cards_verifier.check`.  Total.
        """
        level, message = check(
            completion, example.fields["numbers"], example.fields["target"], fractions=self.fractions
        )
        correct = level is Level.CORRECT
        return Score(
            reward=REWARDS[self.reward][level],
            correct=correct,
            well_formed=level > Level.ILL_FORMED,
            message=message,
        )

    def mistakes(self, example: Example, count: int, index: int) -> list[str]:
        """Up to `count` different wrong answers to `example`, number `index` of its split: a pure function of
        the three.
        """
        return mistakes(example, count, lambda text: not self.verify(example, text).correct, self.seed, index)

    def steps(self, example: Example, completion: str) -> tuple[list[str], list[bool]]:
        """The parts of `completion` between semicolons, and whether all is right up to the end of each."""
        fields = example.fields
        return completion.split(";"), judge_steps(
            completion, fields["numbers"], fields["target"], fractions=self.fractions
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character of the game: 31 with <pad>, <eos> and <unk>."""
        return char_tokenizer(ALPHABET)

    def _deck(self, split: str) -> Deck:
        if split not in SPLITS:
            raise UserError(f"cards: expected a split of {', '.join(SPLITS)}; got {split!r}")
        deck = _deck(self, split)
        if not deck.problems:
            raise UserError(
                f"cards: no problem falls into split {split!r}; widen targets, val or test, "
                "or train on one rule only"
            )
        return deck

    def _same_numbers(self, hand: str, problem: Problem, index: int) -> str:
        """Another hand of the same numbers where there is one, the order changed where it can be."""
        every = [h for h in hands(problem.numbers, problem.rule) if h != hand]
        moved = [h for h in every if translate(h, problem.rule) != translate(hand, problem.rule)]
        choices = moved or every or [hand]
        return choices[draw(self.seed, "perturbed", hand, index) % len(choices)]

    def _example(self, problem: Problem, hand: str, split: str, index: int) -> Example:
        rule, pool, target = problem
        noise = "".join(
            FILLER[draw(self.seed, split, index, "filler", i) % len(FILLER)] for i in range(self.filler)
        )
        ways = solutions(pool, target, fractions=self.fractions, limit=self.limit)
        numbers = translate(hand, rule)
        return Example(
            prompt=f"{'#' if noise else ''}{noise}{rule}:{hand}>{target}|",
            demo=write(numbers, ways[draw(self.seed, split, index, "demo") % len(ways)]),
            fields={"rule": rule, "cards": hand, "numbers": list(numbers), "target": target},
        )


@lru_cache(maxsize=64)
def _deck(task: Cards, split: str) -> Deck:
    low, high = task.targets
    shares = {"val": task.val, "test": task.test, "train": 1 - task.val - task.test}
    home = "test" if split in ("ood_rule", "perturbed") else split
    other = split == "ood_rule"
    problems, turns = [], []
    for rule, numbers in (
        (r, n) for r in RULES if (r in task.rules) != other for n in number_sets(task.k, r)
    ):
        dealt = len(hands(numbers, rule, other))
        ends = reachable(numbers, fractions=task.fractions, limit=task.limit)
        for target in sorted(int(end) for end in ends if end.denominator == 1 and low <= end <= high):
            if dealt and bucket(shares, "cards", numbers, target) == home:
                problems.append(Problem(rule, numbers, target))
                turns.append(task.repeats if split == "train" else dealt)
    rounds = (sum(t > turn for t in turns) for turn in range(max(turns, default=0)))
    return Deck(tuple(problems), tuple(turns), (0, *accumulate(rounds)), other)


@lru_cache(maxsize=512)
def _round(task: Cards, split: str, turn: int) -> list[int]:
    """The places in the deck's problems that are dealt in round `turn`, shuffled."""
    deck = _deck(task, split)
    places = [i for i, turns in enumerate(deck.turns) if turns > turn]
    return sorted(places, key=lambda i: draw(task.seed, split, turn, deck.problems[i]))
