"""The k-card arithmetic game (GeneralPoints, arXiv 2501.17161), generated from a seed and verified exactly.

    prompt      a:7K3>18|                 rule, cards, target          (with filler=4: #x1y2a:7K3>18|)
    completion  7,13,3;13-7=6;6*3=18      the cards' numbers, then k-1 steps over a pool

Under rule a the face cards J, Q, K count 10; under rule b 11, 12, 13.  A problem is (rule, sorted numbers,
target), and problems are split by (sorted numbers, target): under rule a many hands count the same numbers,
so a split by cards would leak.

    train, val, test   the rules trained on; val and test problems are in no training set, whatever its rules
                       and seed
    ood_rule           test problems under the other rule, with a face card, so that the rules differ
    perturbed          test prompts with the cards in another order, other cards of the same number, and
                       other filler
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerFast

from fastrl.errors import UserError, choose, require
from fastrl.tasks.cards.mistakes import mistakes
from fastrl.tasks.cards.rules import (
    RANKS,
    RULES,
    hands,
    number_sets,
    reachable,
    solutions,
    translate,
    write_answer,
)
from fastrl.tasks.cards.verifier import Level, check, judge_steps
from fastrl.tasks.task import Example, Score, assign_split, draw
from fastrl.tasks.tokens import char_tokenizer

SPLITS = ("train", "val", "test", "ood_rule", "perturbed")
REWARDS = {  # one reward per Level: ill-formed, wrong numbers, wrong steps, correct
    "binary": (0.0, 0.0, 0.0, 1.0),
    "ladder": (0.0, 0.05, 0.1, 1.0),
}
FILLER = "".join(dict.fromkeys("0123456789" + RANKS))
ALPHABET = "".join(dict.fromkeys(FILLER + "".join(RULES) + "#:>|,;=+-*/"))


class Problem(NamedTuple):
    """What splits consist of; a pair of (sorted) numbers and target is in one split only."""

    rule: str
    numbers: tuple[int, ...]
    target: int


class Deck(NamedTuple):
    """The problems of a split, dealt in rounds: each deals one more hand of every problem with turns left.

    turns   rounds in which each problem is dealt: its distinct hands, or `repeats` in train
    starts  index of the first example of every round, and the split's size at the end
    faces   every hand holds a face card
    """

    problems: tuple[Problem, ...]
    turns: tuple[int, ...]
    starts: tuple[int, ...]
    faces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The task; `example` is a pure function of its arguments and these options."""

    name: ClassVar[str] = "cards"
    stop: ClassVar[tuple[str, ...]] = ()

    k: int = 3
    """Cards in a hand, 2 to 4."""
    targets: tuple[int, int] = (1, 40)
    """Lowest and highest target."""
    rules: str = "a"
    """Rules to train on: a, b or ab."""
    fractions: bool = False
    """Allow fractions as results of steps; otherwise every result is an integer of at least 0."""
    limit: int | None = 99
    """Largest result in a demonstration (None: any).  The verifier accepts any exact result."""
    filler: int = 0
    """Random, meaningless characters before the prompt."""
    reward: str = "binary"
    """A row of REWARDS."""
    val: float = 0.05
    """Share of the problems in the validation split."""
    test: float = 0.15
    """Share of the problems in the test split, and in the splits made from it."""
    repeats: int = 64
    """Rounds of the training split: each deals every problem once more, with another hand and
    demonstration.
    """
    seed: int = 0
    """Changes orders, hands, demonstrations and filler, but no problem's split."""

    def __post_init__(self) -> None:
        require("cards: k", self.k, 2 <= self.k <= 4, "2, 3 or 4 cards")
        pair = len(self.targets) == 2 and all(isinstance(end, int) for end in self.targets)
        low, high = self.targets if pair else (0, 0)
        require(
            "cards: targets",
            self.targets,
            1 <= low <= high,
            "two numbers, 1 <= low <= high",
        )
        require(
            "cards: rules",
            repr(self.rules),
            self.rules in ("a", "b", "ab"),
            "a, b or ab",
        )
        in_limit = self.limit is None or self.limit >= high
        require(
            "cards: limit",
            self.limit,
            in_limit,
            f"at least the highest target {high}",
        )
        require(
            "cards: filler",
            self.filler,
            0 <= self.filler <= 64,
            "0 to 64 characters",
        )
        choose(self.reward, REWARDS, "cards: reward")
        shares = self.val >= 0 and self.test >= 0 and self.val + self.test < 1
        given = f"{self.val} and {self.test}"
        require(
            "cards: val, test",
            given,
            shares,
            "shares that leave something to train on",
        )
        require(
            "cards: repeats",
            self.repeats,
            self.repeats >= 1,
            "at least 1",
        )

    def size(self, split: str) -> int:
        """Number of distinct prompts in `split`; in train `repeats` hands per problem.

        Raises UserError for a split that is unknown or empty.
        """
        return self._deck(split).starts[-1]

    def example(self, split: str, index: int) -> Example:
        """Example `index` of `split`; consecutive examples are different problems until each was dealt once.

        Raises UserError for an unknown split, IndexError for an index outside [0, size(split)).
        """
        deck = self._deck(split)
        size = deck.starts[-1]
        if not 0 <= index < size:
            raise IndexError(f"index: expected 0 <= index < {size}, the size of {split!r}; got {index}")

        dealt = "test" if split == "perturbed" else split
        turn = bisect_right(deck.starts, index) - 1
        order = _round(self, dealt, turn)
        problem = deck.problems[order[index - deck.starts[turn]]]

        every = hands(problem.numbers, problem.rule, deck.faces)
        hand = every[(draw(self.seed, dealt, problem) + turn) % len(every)]
        if split == "perturbed":
            hand = self._same_numbers(hand, problem, index)
        return self._example(problem, hand, split, index)

    def verify(self, example: Example, completion: str) -> Score:
        """The reward of the level that `verifier.check` finds; binary: 1 for a correct answer.  Total."""
        fields = example.fields
        level, message = check(
            completion,
            fields["numbers"],
            fields["target"],
            fractions=self.fractions,
        )
        return Score(
            reward=REWARDS[self.reward][level],
            correct=level is Level.CORRECT,
            well_formed=level > Level.ILL_FORMED,
            message=message,
        )

    def mistakes(
        self,
        example: Example,
        count: int,
        index: int,
    ) -> list[str]:
        """Up to `count` different wrong answers to `example`, number `index` of its split.

        A pure function of the three.
        """

        def wrong(text: str) -> bool:
            return not self.verify(example, text).correct

        return mistakes(example, count, wrong, self.seed, index)

    def steps(self, example: Example, completion: str) -> tuple[list[str], list[bool]]:
        """The parts of `completion` between semicolons, and whether everything is right up to each end."""
        fields = example.fields
        right = judge_steps(
            completion,
            fields["numbers"],
            fields["target"],
            fractions=self.fractions,
        )
        return completion.split(";"), right

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character of the game: 31 with <pad>, <eos> and <unk>."""
        return char_tokenizer(ALPHABET)

    def _deck(self, split: str) -> Deck:
        if split not in SPLITS:
            raise UserError(f"cards: expected a split of {', '.join(SPLITS)}; got {split!r}")
        deck = _deck(self, split)
        if not deck.problems:
            advice = "widen targets, val or test, or train on one rule only"
            raise UserError(f"cards: no problem falls into split {split!r}; {advice}")
        return deck

    def _same_numbers(
        self,
        hand: str,
        problem: Problem,
        index: int,
    ) -> str:
        """Another hand of the same numbers, in another order if possible; `hand` if there is no other."""
        numbers = translate(hand, problem.rule)
        others = [h for h in hands(problem.numbers, problem.rule) if h != hand]
        reordered = [h for h in others if translate(h, problem.rule) != numbers]
        choices = reordered or others or [hand]
        return choices[draw(self.seed, "perturbed", hand, index) % len(choices)]

    def _example(
        self,
        problem: Problem,
        hand: str,
        split: str,
        index: int,
    ) -> Example:
        rule, pool, target = problem
        numbers = translate(hand, rule)

        prefix = "#" if self.filler else ""
        for i in range(self.filler):
            prefix += FILLER[draw(self.seed, split, index, "filler", i) % len(FILLER)]

        ways = solutions(
            pool,
            target,
            fractions=self.fractions,
            limit=self.limit,
        )
        steps = ways[draw(self.seed, split, index, "demo") % len(ways)]
        return Example(
            prompt=f"{prefix}{rule}:{hand}>{target}|",
            demo=write_answer(numbers, steps),
            fields={"rule": rule, "cards": hand, "numbers": list(numbers), "target": target},
        )


@lru_cache(maxsize=64)
def _deck(task: Cards, split: str) -> Deck:
    shares = {"val": task.val, "test": task.test, "train": 1 - task.val - task.test}
    home = "test" if split in ("ood_rule", "perturbed") else split
    other_rule = split == "ood_rule"

    problems = []
    turns = []
    for rule in RULES:
        if (rule in task.rules) == other_rule:
            continue
        for numbers in number_sets(task.k, rule):
            dealt = len(hands(numbers, rule, other_rule))
            if not dealt:
                continue
            for target in _targets(task, numbers):
                if assign_split(shares, "cards", numbers, target) == home:
                    problems.append(Problem(rule, numbers, target))
                    turns.append(task.repeats if split == "train" else dealt)

    sizes = [sum(t > turn for t in turns) for turn in range(max(turns, default=0))]
    return Deck(
        tuple(problems),
        tuple(turns),
        (0, *accumulate(sizes)),
        other_rule,
    )


def _targets(task: Cards, numbers: tuple[int, ...]) -> list[int]:
    """The task's targets that `numbers` can reach, sorted."""
    low, high = task.targets
    ends = reachable(numbers, fractions=task.fractions, limit=task.limit)
    return sorted(int(end) for end in ends if end.denominator == 1 and low <= end <= high)


@lru_cache(maxsize=512)
def _round(task: Cards, split: str, turn: int) -> list[int]:
    """Indices of the deck's problems that are dealt in round `turn`, shuffled."""
    deck = _deck(task, split)
    dealt = [i for i, turns in enumerate(deck.turns) if turns > turn]
    return sorted(dealt, key=lambda i: draw(task.seed, split, turn, deck.problems[i]))
