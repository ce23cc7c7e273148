"""Wrong answers to the card game, of four kinds, each made from a right answer: data for reward models."""

from __future__ import annotations

from collections.abc import Callable

from fastrl.tasks.cards.rules import reachable, solutions, write_answer
from fastrl.tasks.task import Example, draw

TRIES = 64  # candidates per wrong answer that is asked for


def other_target(example: Example, key: int) -> str:
    """Correct steps that end at another number."""
    numbers = example.fields["numbers"]
    target = example.fields["target"]
    pool = tuple(sorted(numbers))
    ends = sorted(int(e) for e in reachable(pool) if e.denominator == 1 and e != target)
    if not ends:
        return ""

    ways = solutions(pool, ends[key % len(ends)])
    if not ways:
        return ""
    return write_answer(tuple(numbers), ways[draw(key) % len(ways)])


def false_step(example: Example, key: int) -> str:
    """The target as the stated result of a last step that gives another number."""
    before, equals, _ = other_target(example, key).rpartition("=")
    return f"{before}={example.fields['target']}" if equals else ""


def other_card(example: Example, key: int) -> str:
    """A card counted as another number."""
    head, _, steps = (example.demo or "").partition(";")
    numbers = head.split(",")
    numbers[key % len(numbers)] = str(1 + draw(key) % 13)
    return f"{','.join(numbers)};{steps}"


def cut_short(example: Example, key: int) -> str:
    """The answer without its end."""
    demo = example.demo or ""
    return demo[: 1 + key % max(len(demo) - 1, 1)]


KINDS = (other_target, false_step, other_card, cut_short)


def mistakes(example: Example, count: int, wrong: Callable[[str], bool], *key: object) -> list[str]:
    """Up to `count` different answers that are `wrong`, of all kinds in turn; fewer when TRIES run out."""
    answers: dict[str, None] = {}
    first = draw("mistakes", *key)
    for turn in range(TRIES * count):
        if len(answers) == count:
            break
        make = KINDS[(first + turn) % len(KINDS)]
        answer = make(example, draw("mistakes", *key, turn))
        if answer and wrong(answer):
            answers.setdefault(answer)
    return list(answers)


def of_each_kind(example: Example, wrong: Callable[[str], bool], *key: object) -> dict[str, str]:
    """One `wrong` answer of each kind, by the kind's name; a kind without one is left out."""
    answers = {}
    for kind in KINDS:
        for turn in range(TRIES):
            answer = kind(example, draw("mistakes", *key, kind.__name__, turn))
            if answer and wrong(answer):
                answers[kind.__name__] = answer
                break
    return answers
