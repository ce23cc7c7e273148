"""The k-card arithmetic game (GeneralPoints): card ranks, the four operations, and an exact solver.

Every card's number is used exactly once, with + - * /, to reach the target.  A solution is a list of steps:
each takes two numbers out of the pool and puts their result back, until only the target is left.

Numbers are Python integers, or Fractions when the game allows them, never floats: 8 / (3 - 8 / 3) is
23.99999999999999 in floats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, permutations, product

Number = int | Fraction
Pool = tuple[Number, ...]  # sorted
Step = tuple[Number, str, Number, Number]  # left, operation, right, result

RANKS = "A23456789TJQK"
FACES = "JQK"
RULES = {  # what J, Q and K count; A is 1 and T is 10 under every rule
    "a": {"J": 10, "Q": 10, "K": 10},
    "b": {"J": 11, "Q": 12, "K": 13},
}
OPERATIONS = "+-*/"
_PIPS = {rank: i + 1 for i, rank in enumerate(RANKS) if rank not in FACES}
_INTEGER = re.compile(r"0|[1-9][0-9]*")
_FRACTION = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")


def translate(cards: str, rule: str) -> tuple[int, ...]:
    """The numbers that `cards` count, in order."""
    values = _PIPS | RULES[rule]
    return tuple(values[card] for card in cards)


def number_sets(k: int, rule: str) -> Iterator[tuple[int, ...]]:
    """Every multiset of k numbers that some hand has under `rule`, sorted."""
    numbers = sorted(set(translate(RANKS, rule)))
    return combinations_with_replacement(numbers, k)


@lru_cache(maxsize=1 << 14)
def hands(numbers: tuple[int, ...], rule: str, faces: bool = False) -> tuple[str, ...]:
    """Every ordered hand that counts the multiset `numbers` under `rule`.

    faces  only hands with a face card
    """
    ranks = {n: [r for r in RANKS if translate(r, rule) == (n,)] for n in set(numbers)}
    dealt = []
    for order in sorted(set(permutations(numbers))):
        for cards in product(*(ranks[n] for n in order)):
            if not faces or set(cards) & set(FACES):
                dealt.append("".join(cards))
    return tuple(dealt)


def apply(
    left: Number,
    operation: str,
    right: Number,
    *,
    fractions: bool,
) -> Number | None:
    """The exact result, or None where the game forbids it.

    Forbidden are results below 0, division by 0, and, without `fractions`, results that are not integers.
    """
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right if left >= right else None
    if operation == "*":
        return left * right
    if right == 0:
        return None
    if fractions:
        return _plain(Fraction(left) / right)
    return left // right if left % right == 0 else None


def moves(pool: Pool, *, fractions: bool, limit: int | None) -> Iterator[tuple[Step, Pool]]:
    """Every step that the sorted `pool` allows, and the pool after it.

    Of the two orders of a sum or a product, only the one with the larger operand first is tried.  Results
    above `limit` are left out (None keeps them), and equal pairs of numbers are tried once.
    """
    seen = set()
    for j, i in combinations(range(len(pool)), 2):
        low = pool[j]
        high = pool[i]
        if (high, low) in seen:
            continue
        seen.add((high, low))
        rest = pool[:j] + pool[j + 1 : i] + pool[i + 1 :]

        orders = [(high, op, low) for op in OPERATIONS]
        if low != high:
            orders.append((low, "/", high))
        for left, op, right in orders:
            result = apply(left, op, right, fractions=fractions)
            if result is not None and (limit is None or result <= limit):
                yield (left, op, right, result), tuple(sorted((*rest, result)))


@lru_cache(maxsize=1 << 17)
def reachable(pool: Pool, *, fractions: bool = False, limit: int | None = 99) -> frozenset[Number]:
    """Every number that the sorted `pool` can be turned into."""
    if len(pool) == 1:
        return frozenset(pool)

    numbers: set[Number] = set()
    pools_after = {after for _, after in moves(pool, fractions=fractions, limit=limit)}
    for after in pools_after:
        numbers |= reachable(after, fractions=fractions, limit=limit)
    return frozenset(numbers)


@lru_cache(maxsize=1 << 14)
def solutions(
    pool: Pool,
    target: int,
    *,
    fractions: bool = False,
    limit: int | None = 99,
) -> tuple[tuple[Step, ...], ...]:
    """Every solution as its steps; the two orders of a sum or a product count once."""
    if len(pool) == 1:
        return ((),) if pool[0] == target else ()

    ways = []
    for step, after in moves(pool, fractions=fractions, limit=limit):
        if target in reachable(after, fractions=fractions, limit=limit):
            rests = solutions(after, target, fractions=fractions, limit=limit)
            ways += [(step, *rest) for rest in rests]
    return tuple(ways)


def write_answer(numbers: tuple[Number, ...], steps: tuple[Step, ...]) -> str:
    """The answer that shows `steps` for cards worth `numbers`: `7,13,3;13-7=6;6*3=18`."""
    head = ",".join(map(str, numbers))
    tail = [f"{left}{op}{right}={result}" for left, op, right, result in steps]
    return ";".join([head, *tail])


def read_number(text: str, *, fractions: bool) -> Number | None:
    """The number that `text` spells, or None; a number has one spelling: no sign, no leading zero, lowest
    terms.
    """
    if _INTEGER.fullmatch(text):
        return int(text)
    match = _FRACTION.fullmatch(text) if fractions else None
    if match is None:
        return None
    value = Fraction(int(match[1]), int(match[2]))
    return value if str(value) == text else None  # 2/4 and 4/1 are spelt 1/2 and 4


def _plain(value: Fraction) -> Number:
    return value.numerator if value.denominator == 1 else value
