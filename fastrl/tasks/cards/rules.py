"""The k-card arithmetic game (GeneralPoints): card ranks, the four operations, and an exact solver.

Every card's number is used exactly once, with + - * /, to reach the target.  A solution is a list of steps:
each takes two numbers out of the pool and puts their result back, until the target alone is left.

Numbers are Python integers, or Fractions when the game allows them; never floats: 8 / (3 - 8 / 3) is
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
    """The numbers of `cards`, in their order."""
    values = _PIPS | RULES[rule]
    return tuple(values[card] for card in cards)


def number_sets(k: int, rule: str) -> Iterator[tuple[int, ...]]:
    """Every multiset of k numbers some hand has under `rule`, sorted."""
    return combinations_with_replacement(sorted(set(translate(RANKS, rule))), k)


@lru_cache(maxsize=1 << 14)
def hands(numbers: tuple[int, ...], rule: str, faces: bool = False) -> tuple[str, ...]:
    """Every ordered hand that counts as the multiset `numbers` under `rule`; with `faces`, those with a face
    card.
    """
    ranks = {n: [r for r in RANKS if translate(r, rule) == (n,)] for n in set(numbers)}
    dealt = (
        "".join(h)
        for order in sorted(set(permutations(numbers)))
        for h in product(*(ranks[n] for n in order))
    )
    return tuple(h for h in dealt if not faces or set(h) & set(FACES))


def apply(left: Number, operation: str, right: Number, *, fractions: bool) -> Number | None:
    """The exact result, or None where the game has none: below 0, divided by 0, or no integer unless
    `fractions`.
    """
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right if left >= right else None
    if operation == "*":
        return left * right
    if right == 0:
        return None
    return _plain(Fraction(left) / right) if fractions else left // right if left % right == 0 else None


def moves(pool: Pool, *, fractions: bool, limit: int | None) -> Iterator[tuple[Step, Pool]]:
    """Every step the sorted `pool` allows and the pool after it; the larger operand first where the order is
    free.

    Results above `limit` are left out (None keeps them), and equal pairs of numbers are tried once.
    """
    seen = set()
    for j, i in combinations(range(len(pool)), 2):
        low, high = pool[j], pool[i]
        if (high, low) in seen:
            continue
        seen.add((high, low))
        rest = pool[:j] + pool[j + 1 : i] + pool[i + 1 :]
        orders = [(high, op, low) for op in OPERATIONS] + ([(low, "/", high)] if low != high else [])
        for left, op, right in orders:
            result = apply(left, op, right, fractions=fractions)
            if result is not None and (limit is None or result <= limit):
                yield (left, op, right, result), tuple(sorted((*rest, result)))


@lru_cache(maxsize=1 << 17)
def reachable(pool: Pool, *, fractions: bool = False, limit: int | None = 99) -> frozenset[Number]:
    """Every number the sorted `pool` can be turned into."""
    if len(pool) == 1:
        return frozenset(pool)
    return frozenset().union(
        *(
            reachable(after, fractions=fractions, limit=limit)
            for after in {p for _, p in moves(pool, fractions=fractions, limit=limit)}
        )
    )


@lru_cache(maxsize=1 << 14)
def solutions(
    pool: Pool, target: int, *, fractions: bool = False, limit: int | None = 99
) -> tuple[tuple[Step, ...], ...]:
    """Every stepwise solution, as step lists; the two orders of a sum or a product count once.  Empty when
    there is none.
    """
    if len(pool) == 1:
        return ((),) if pool[0] == target else ()
    found = []
    for step, after in moves(pool, fractions=fractions, limit=limit):
        if target in reachable(after, fractions=fractions, limit=limit):
            found += [(step, *rest) for rest in solutions(after, target, fractions=fractions, limit=limit)]
    return tuple(found)


def write(numbers: tuple[Number, ...], steps: tuple[Step, ...]) -> str:
    """The answer that shows `steps` for cards worth `numbers`: `7,13,3;13-7=6;6*3=18`."""
    return ";".join([",".join(map(str, numbers)), *(f"{a}{op}{b}={c}" for a, op, b, c in steps)])


def read_number(text: str, *, fractions: bool) -> Number | None:
    """The number `text` spells in its only allowed spelling (no sign, no leading zero, lowest terms), or
    None.
    """
    if _INTEGER.fullmatch(text):
        return int(text)
    found = _FRACTION.fullmatch(text) if fractions else None
    if found is None:
        return None
    value = Fraction(int(found[1]), int(found[2]))
    return value if str(value) == text else None  # 2/4 and 4/1 are spelt 1/2 and 4


def _plain(value: Fraction) -> Number:
    return value.numerator if value.denominator == 1 else value
