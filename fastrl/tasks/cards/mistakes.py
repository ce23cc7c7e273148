"""Wrong answers to the card game, of four kinds, made from a right one: what a reward model learns to tell
from it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastrl.tasks.cards.rules import reachable, solutions, write
from fastrl.tasks.task import Example, draw

TRIES = 64  # candidates looked at for each wrong answer that is asked for


def other_target(example: Example, key: int) -> str:
    """Exact steps that end elsewhere."""
    numbers, target = example.fields["numbers"], example.fields["target"]
    pool = tuple(sorted(numbers))
    ends = sorted(int(e) for e in reachable(pool) if e.denominator == 1 and e != target)
    ways = solutions(pool, ends[key % len(ends)]) if ends else ()
    return write(tuple(numbers), ways[draw(key) % len(ways)]) if ways else ""


def false_step(example: Example, key: int) -> str:
    """The target stated as the result of a last step that does not give it."""
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
    """Up to `count` different answers that are `wrong`, of all kinds in turn; fewer where the example has no
    more.
    """
    found: dict[str, None] = {}
    first = draw("mistakes", *key)
    for turn in range(TRIES * count):
        if len(found) == count:
            break
        answer = KINDS[(first + turn) % len(KINDS)](example, draw("mistakes", *key, turn))
        if answer and wrong(answer):
            found.setdefault(answer)
    return list(found)


def of_each_kind(example: Example, wrong: Callable[[str], bool], *key: object) -> dict[str, str]:
    """An answer that is `wrong` of every kind, by the kind's name; kinds that the example has none of are
    left out.
    """
    found = {}
    for kind in KINDS:
        answers = (kind(example, draw("mistakes", *key, kind.__name__, turn)) for turn in range(TRIES))
        answer = next((a for a in answers if a and wrong(a)), None)
        if answer is not None:
            found[kind.__name__] = answer
    return found
