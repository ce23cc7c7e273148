"""The verifier of the card game: reads an answer step by step, in exact arithmetic, and never evaluates it.

    answer  = number ("," number){k-1} (";" step){k-1}        step = number op number "=" number
    number  = "0" | digits without a leading zero | numerator "/" denominator in lowest terms (when fractions
            are on)

An answer is well-formed if this grammar derives it: no spaces, no signs, no leading zeros, so that a correct
answer has one spelling per choice of steps.  The checks follow the reading order, and the first failure is
reported.
"""

from __future__ import annotations

from enum import IntEnum

from fastrl.tasks.cards.rules import OPERATIONS, Number, apply, read_number

# far more than the solver writes; bounds the time of the checks and the size of every number
CHARACTERS_PER_CARD = 64
Reading = tuple[Number, str, Number]  # left, operation, right


class Level(IntEnum):
    """How far an answer passed the checks."""

    ILL_FORMED = 0
    WRONG_NUMBERS = 1  # well-formed, but the stated numbers are not the cards'
    WRONG_STEPS = 2  # the numbers are right, but a step is wrong or the target is missed
    CORRECT = 3


def check(
    answer: str,
    numbers: list[int],
    target: int,
    *,
    fractions: bool,
) -> tuple[Level, str]:
    """(level, reason) of `answer` for cards that count `numbers`, in order.  Total, and bounded in time."""
    k = len(numbers)
    longest = CHARACTERS_PER_CARD * k
    if len(answer) > longest:
        return Level.ILL_FORMED, f"{len(answer)} characters; an answer has at most {longest}"

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

        # 8/3/2 reads as (8/3)/2 or 8/(3/2): at most one of the readings has the stated result
        exact = [reading for reading in in_pool if apply(*reading, fractions=fractions) == result]
        if not exact or result is None:
            return Level.WRONG_STEPS, f"{text!r} is not so"
        rest = _take(pool, exact[0]) or []
        pool = [*rest, result]

    if pool != [target]:
        return Level.WRONG_STEPS, f"ends at {pool[0]}, the target is {target}"
    return Level.CORRECT, "correct"


def judge_steps(
    answer: str,
    numbers: list[int],
    target: int,
    *,
    fractions: bool,
) -> list[bool]:
    """For each part of `answer` between semicolons, whether everything is right up to its end.

    The last verdict is that of the whole answer.  A part after a wrong one is wrong.  Total, and bounded in
    time.
    """
    head, *tail = answer.split(";")
    if len(answer) > CHARACTERS_PER_CARD * len(numbers):
        return [False] * (1 + len(tail))

    right = [read_number(n, fractions=False) for n in head.split(",")] == list(numbers)
    verdicts = [right]
    pool = list[Number](numbers)
    for text in tail:
        readings, result = _read_step(text, fractions)
        in_pool = [r for r in readings if _take(pool, r) is not None]
        exact = [r for r in in_pool if apply(*r, fractions=fractions) == result]
        if not exact or result is None:
            right = False
        if right and result is not None:
            rest = _take(pool, exact[0]) or []
            pool = [*rest, result]
        verdicts.append(right)

    level, _ = check(answer, numbers, target, fractions=fractions)
    verdicts[-1] = level is Level.CORRECT
    return verdicts


def _read_step(text: str, fractions: bool) -> tuple[list[Reading], Number | None]:
    """Every way to read `left op right` before the equals sign, and the result stated after it."""
    body, _, stated = text.partition("=")
    readings = []
    for i, operation in enumerate(body):
        if operation not in OPERATIONS:
            continue
        left = read_number(body[:i], fractions=fractions)
        right = read_number(body[i + 1 :], fractions=fractions)
        if left is not None and right is not None:
            readings.append((left, operation, right))
    return readings, read_number(stated, fractions=fractions)


def _take(pool: list[Number], reading: Reading) -> list[Number] | None:
    """`pool` without both operands, or None unless it holds both."""
    rest = list(pool)
    for operand in (reading[0], reading[2]):
        if operand not in rest:
            return None
        rest.remove(operand)
    return rest
