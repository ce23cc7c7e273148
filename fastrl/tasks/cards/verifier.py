"""The verifier of the card game: reads an answer step by step with exact arithmetic, and never evaluates it.

    answer  = number ("," number){k-1} (";" step){k-1}        step = number op number "=" number
    number  = "0" | digits without a leading zero | numerator "/" denominator in lowest terms (when fractions
            are on)

Well-formed is what this grammar derives, nothing before, after or between: no spaces, no signs, no leading
zeros, so that every correct answer has one spelling per choice of steps.  The checks follow the reading order
and the first failure is reported.
"""

from __future__ import annotations

from enum import IntEnum

from fastrl.tasks.cards.rules import OPERATIONS, Number, apply, read_number

CHARACTERS_PER_CARD = (
    64  # no answer the solver writes comes near; it bounds the time and the size of every number
)
Reading = tuple[Number, str, Number]  # left, operation, right


class Level(IntEnum):
    """How far an answer got."""

    ILL_FORMED = 0
    WRONG_NUMBERS = 1  # well-formed, but the cards are not worth what it says
    WRONG_STEPS = 2  # the numbers are right; a step is not, or the target is missed
    CORRECT = 3


def check(answer: str, numbers: list[int], target: int, *, fractions: bool) -> tuple[Level, str]:
    """How far `answer` got for cards worth `numbers`, in their order, and why no further.  Total, and bounded
    in time.
    """
    k = len(numbers)
    if len(answer) > CHARACTERS_PER_CARD * k:
        return Level.ILL_FORMED, f"{len(answer)} characters; an answer has at most {CHARACTERS_PER_CARD * k}"
    head, *tail = answer.split(";")
    stated = [read_number(n, fractions=False) for n in head.split(",")]
    if len(stated) != k or None in stated:
        return Level.ILL_FORMED, f"expected {k} numbers separated by commas, got {head!r}"
    if len(tail) != k - 1:
        return Level.ILL_FORMED, f"expected {k - 1} steps, got {len(tail)}"
    steps = [_read_step(text, fractions) for text in tail]
    for text, (readings, result) in zip(tail, steps, strict=True):
        if not readings or result is None:
            return Level.ILL_FORMED, f"not a step: {text!r}"
    if stated != list(numbers):
        return Level.WRONG_NUMBERS, f"the cards are worth {numbers}, not {stated}"
    return _play(numbers, tail, steps, target, fractions)


def _play(
    numbers: list[int],
    texts: list[str],
    steps: list[tuple[list[Reading], Number | None]],
    target: int,
    fractions: bool,
) -> tuple[Level, str]:
    pool: list[Number] = list(numbers)
    for text, (readings, result) in zip(texts, steps, strict=True):
        in_pool = [reading for reading in readings if _take(pool, reading) is not None]
        if not in_pool:
            return Level.WRONG_STEPS, f"{text!r} uses a number that is not in {[str(n) for n in pool]}"
        # 8/3/2 reads as (8/3)/2 or 8/(3/2): at most one of the readings has the result that is stated
        exact = [reading for reading in in_pool if apply(*reading, fractions=fractions) == result]
        if not exact or result is None:
            return Level.WRONG_STEPS, f"{text!r} is not so"
        pool = [*(_take(pool, exact[0]) or []), result]
    if pool != [target]:
        return Level.WRONG_STEPS, f"ends at {pool[0]}, the target is {target}"
    return Level.CORRECT, "correct"


def judge_steps(answer: str, numbers: list[int], target: int, *, fractions: bool) -> list[bool]:
    """Of each part of `answer` between semicolons, whether all is right up to its end; of the last, whether
    the answer is correct.

    A part behind a wrong one is wrong: nothing right can come of it.  Total, and bounded in time.
    """
    head, *tail = answer.split(";")
    if len(answer) > CHARACTERS_PER_CARD * len(numbers):
        return [False] * (1 + len(tail))
    right = [read_number(n, fractions=False) for n in head.split(",")] == list(numbers)
    found, pool = [right], list[Number](numbers)
    for text in tail:
        readings, result = _read_step(text, fractions)
        exact = [
            r for r in readings if _take(pool, r) is not None and apply(*r, fractions=fractions) == result
        ]
        right = right and bool(exact) and result is not None
        pool = [*(_take(pool, exact[0]) or []), result] if right and result is not None else pool
        found.append(right)
    found[-1] = check(answer, numbers, target, fractions=fractions)[0] is Level.CORRECT
    return found


def _read_step(text: str, fractions: bool) -> tuple[list[Reading], Number | None]:
    """Every way to read `left op right` before the equals sign, and the result stated after it."""
    body, _, stated = text.partition("=")
    readings = []
    for place, operation in enumerate(body):
        if operation in OPERATIONS:
            left, right = (
                read_number(side, fractions=fractions) for side in (body[:place], body[place + 1 :])
            )
            if left is not None and right is not None:
                readings.append((left, operation, right))
    return readings, read_number(stated, fractions=fractions)


def _take(pool: list[Number], reading: Reading) -> list[Number] | None:
    """`pool` without both operands, or None when it does not hold them."""
    rest = list(pool)
    for operand in (reading[0], reading[2]):
        if operand not in rest:
            return None
        rest.remove(operand)
    return rest
